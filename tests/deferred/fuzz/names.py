"""The names that statements of programs use: the models, operands, losses, hooks and helpers."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models import B, T, V, build, patched
from .programs import Setting

SMOOTHING = 0.1

Patch = Callable[..., Any] | None


def labels_of(x: Tensor) -> Tensor:
    """Labels for logits, some of them ignored."""
    rows, classes = x.shape[:-1], x.shape[-1]
    count = rows.numel()
    labels = (torch.arange(count, device=x.device) * 7 + 3) % classes
    return labels.masked_fill(torch.arange(count, device=x.device) % 4 == 1, -100).view(rows)


def index_of(x: Tensor) -> Tensor:
    """A class for each row of logits, to gather with."""
    rows, classes = x.shape[:-1], x.shape[-1]
    return ((torch.arange(rows.numel(), device=x.device) * 5 + 2) % classes).view(*rows, 1)


def like(x: Tensor, seed: int = 0) -> Tensor:
    """Constants of the shape of `x`, from -1 to 1."""
    return torch.linspace(0.3, 7.1 + seed, x.shape.numel(), dtype=x.dtype, device=x.device).sin().view(x.shape)


def probabilities(x: Tensor) -> Tensor:
    """Probabilities as labels for logits."""
    return like(x).softmax(-1)


def class_weight(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)


def ce(x: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(x.flatten(0, -2), labels_of(x).flatten(), **options)


def entropy(x: Tensor) -> Tensor:
    logp = x.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def z_loss(x: Tensor) -> Tensor:
    return x.logsumexp(-1).square().mean()


def picked(x: Tensor) -> Tensor:
    """Log-probabilities of some classes."""
    return x.log_softmax(-1).gather(-1, index_of(x)).squeeze(-1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class HandedOn(torch.autograd.Function):
    """Returns its input detached, as the functions that DeepSpeed puts around modules do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Tripled(HandedOn):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


class _Smoothed:
    """`torch.nn.functional` whose cross entropies of logits of the model have the label smoothing of the options."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def cross_entropy(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(x, y, label_smoothing=SMOOTHING, **options)


def in_thread(function: Callable[[], Any]) -> Any:
    """The function's result, computed in another thread."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(function())
        except Exception as e:
            out.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(out[0], Exception):
        raise out[0]
    return out[0]


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """The functions' results, computed in a thread each, all at once and several times."""
    out: list[Any] = [None] * len(functions)
    ready = threading.Barrier(len(functions))

    def run(i: int) -> None:
        ready.wait()
        try:
            for _ in range(5):
                out[i] = functions[i]()
        except Exception as e:
            out[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    with switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def replica_of(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a model for each device: shallow copies, and parameters that are no leaves."""
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in model.modules()}
    values = {p: p * 1 for p in model.parameters()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else values[parameter])
    return copies[model]


def in_replicas(model: nn.Module, function: Callable[[nn.Module], Any]) -> list[Any]:
    """A function's results for two replicas, each computed in a thread."""
    first, second = replica_of(model), replica_of(model)
    return in_threads(lambda: function(first), lambda: function(second))


def trained(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """The loss of a model and the gradient of its head."""
    loss: Tensor = model(ids, labels=labels).loss
    loss.backward()
    return loss, model.lm_head.weight.grad


def compiled_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of a model whose forward is compiled after it was patched."""
    torch._dynamo.reset()
    own = model.__dict__.get("forward")
    model.forward = torch.compile(model.forward, backend="eager")
    try:
        loss: Tensor = model(ids, labels=labels).loss
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    return loss


def saved_and_loaded(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def torch_saved(x: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def head_flops(model: Any, ids: Tensor) -> bool:
    """Whether the products of a head and of its backward are counted."""
    from torch.utils.flop_counter import FlopCounterMode

    hidden = model.model(ids)[0].detach()
    with FlopCounterMode(display=False) as counter:
        ce(model.lm_head(hidden)).backward()
    return counter.get_total_flops() > 0


class Hooks:
    """Makes hooks that write down what they are called with, unless that is None."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}

    def _note(self, name: str, g: Any) -> None:
        if g is not None:
            self.calls.setdefault(name, []).append(g.detach().clone())

    def see(self, name: str) -> Any:
        """A hook that reads the gradient."""
        return lambda g: self._note(name, g)

    def look(self, name: str) -> Any:
        """A hook that reads no values, as FSDP's."""

        def hook(g: Any) -> None:
            if g is not None:
                self.calls.setdefault(name, []).append((tuple(g.shape), str(g.dtype)))

        return hook

    def scale(self, name: str, factor: float) -> Any:
        """A hook that replaces the gradient."""

        def hook(g: Any) -> Any:
            self._note(name, g)
            return None if g is None else g * factor

        return hook

    def leaf(self, name: str) -> Any:
        """A hook for after the gradient was accumulated in a leaf."""
        return lambda p: self._note(name, p.grad)


def session(setting: Setting, patch: Patch = patched) -> dict[str, Any]:
    """The names that a program's statements use."""
    dtype = getattr(torch, setting.dtype)
    model: Any = build(setting.model, dtype, setting.device, 0)
    other = build("bias" if setting.model == "tiny" else "tiny", dtype, setting.device, 1)
    functional: Any = F
    if setting.options:
        if patch is None:
            model.label_smoothing = SMOOTHING
            functional = _Smoothed()
        else:
            patch(model, label_smoothing=SMOOTHING)
    elif patch is not None:
        patch(model)
        patch(other)
    ids = (torch.arange(B * T, device=setting.device) * 3 + 1).view(B, T) % V
    hooks = Hooks()

    def trainable(*shape: int) -> Tensor:
        values = torch.linspace(0.4, 2.2, int(torch.Size(shape).numel()), dtype=dtype, device=setting.device)
        return (values.cos() * 0.4 + 1).view(shape).requires_grad_()

    return {
        "torch": torch, "F": functional, "copy": copy, "checkpoint": checkpoint, "math": __import__("math"),
        "model": model, "other": other, "ids": ids, "labels": labels_of(ids.new_empty(B, T, V)),
        "V": V, "bias": trainable(V), "temperature": trainable(), "scales": trainable(T, 1), "matrix": trainable(V, V),
        "shift": trainable(V).detach(), "mask": ids % 2 == 1, "hooks": hooks, "see": hooks.see, "look": hooks.look,
        "scale": hooks.scale, "leaf": hooks.leaf, "labels_of": labels_of, "index_of": index_of, "like": like,
        "class_weight": class_weight, "ce": ce, "entropy": entropy, "z_loss": z_loss, "picked": picked,
        "Doubled": Doubled, "HandedOn": HandedOn, "Tripled": Tripled, "in_thread": in_thread, "in_threads": in_threads,
        "replica_of": replica_of,
        "compiled_loss": compiled_loss, "saved_and_loaded": saved_and_loaded, "torch_saved": torch_saved,
        "head_flops": head_flops, "in_replicas": in_replicas, "trained": trained, "probabilities": probabilities,
        "soft_labels": probabilities(torch.empty(B, T, V, dtype=dtype, device=setting.device)),
    }  # fmt: skip
