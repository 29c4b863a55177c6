"""Runs a program on a model and writes down what can be observed: values, gradients, hooks' calls, errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from .models import B, T, V, build, patched, reads
from .programs import Program, Setting, Statement

__all__ = ["Run", "Setting", "observe", "session"]

SMOOTHING = 0.1

Patch = Callable[..., Any] | None

#: What is observed: (what it is, the value).
Observed = list[tuple[str, Any]]


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


_SIMPLE = (int, float, str, bool, type(None))

OPERANDS = ("bias", "temperature", "scales", "matrix", "shift")


class Run:
    """A program that is being run; `observed` grows by what each statement shows."""

    def __init__(self, setting: Setting, patch: Patch) -> None:
        self.setting, self.patch = setting, patch
        self.names = session(setting, patch)
        self.variables: list[str] = []
        self.observed: Observed = []
        self.ended = False
        self._retained: set[str] = set()
        self._freed: set[str] = set()
        self._hidden: dict[int, StorageWeakRef] = {}
        if setting.held:
            # A function, as a bound method would be copied with the model.
            self.names["model"].lm_head.register_forward_pre_hook(lambda _, args: self._remember(args[0]))
        self._background = _Background(self.names) if setting.beside else None

    def _remember(self, hidden: Tensor) -> None:
        ref = StorageWeakRef(hidden.untyped_storage())
        self._hidden.setdefault(ref.cdata, ref)

    def step(self, statement: Statement) -> None:
        if self.ended or not statement.uses <= self.names.keys():
            return
        try:
            before = self._reads() if statement.quiet else {}
            exec(statement.code, self.names)
            after = self._reads() if statement.quiet else {}
        except Exception as e:
            self.observed.append((f"error of `{statement.text}`", e.with_traceback(None)))
            self.ended = statement.backward
            return
        if statement.quiet:
            new = sorted(name for i, found in enumerate(after) for name in found if found[name] != before[i].get(name))
            self.observed.append((f"reads by `{statement.text}`", tuple(new)))
        for name in statement.makes:
            self._observe(f"{name} of `{statement.text}`", functools.partial(self._described, name))
            self.variables.append(name)
        for name in self.variables:
            with contextlib.suppress(RuntimeError):
                _ = getattr(
                    self.names[name], "grad_fn", None
                )  # else PyTorch notices a write to a view at any later time
        self._retained.update(re.findall(r"(\w+)\.retain_grad\(", statement.text))
        if ".backward(" in statement.text and "retain_graph" not in statement.text:
            self._freed.update(re.findall(r"\bs\d+\b", statement.text))
        self._flush_hooks(statement.text)

    def _reads(self) -> Any:
        return [reads(self.names[m]) for m in ("model", "other")] if self.patch is patched else []

    def _described(self, name: str) -> Any:
        """What can be asked about a value that was just made; not the strides, which have made tensors be computed."""
        return self._description(name, self.names[name])

    def _description(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            same = tuple(n for n in (*self.variables, *OPERANDS) if self.names.get(n) is value and n != name)
            return (
                f"shape {tuple(value.shape)}", str(value.dtype), f"is {same}", f"requires_grad={value.requires_grad}",
                f"is_leaf={value.is_leaf}", f"is_inference={value.is_inference()}",
            )  # fmt: skip
        if isinstance(value, (tuple, list)):
            return tuple(self._description(name, v) for v in value)
        return value if isinstance(value, _SIMPLE) else type(value).__name__

    def _flush_hooks(self, text: str) -> None:
        hooks = self.names["hooks"]
        for name in sorted(hooks.calls):
            self.observed.append((f"calls of hook {name} in `{text}`", list(hooks.calls[name])))
        hooks.calls.clear()

    def finish(self) -> Observed:
        """Reads all gradients and values, and whatever else can be seen when a program has ended."""
        if self._background is not None:
            self.observed += self._background.stop()
        if not self.ended:
            self._read_everything()
            if self.setting.held:
                self._observe_held()
        self.observed.append(("torch function modes left on", _modes_switched_off()))
        self.names.clear()
        self._hidden.clear()
        return self.observed

    def _read_everything(self) -> None:
        for module in ("model", "other"):
            for name, parameter in self.names[module].named_parameters():
                self._observe(f"gradient of {module}.{name}", functools.partial(getattr, parameter, "grad"))
        for name in (*OPERANDS, *self.variables):
            value = self.names[name]
            if isinstance(value, Tensor):
                self._observe(f"gradient of {name}", functools.partial(self._gradient, name, value))
        for name in (*OPERANDS, *self.variables):
            self._observe(f"value of {name}", functools.partial(self.names.get, name))
        for name in self.variables:
            if isinstance(self.names[name], Tensor):
                self._observe(f"strides of {name}", functools.partial(_strides, self.names[name]))
        with torch.no_grad():  # another model's loss is its own
            x = F.linear(self.names["shift"].expand(B, V), self.names["matrix"].detach())
            self._observe("loss of a model that is not patched", lambda: F.cross_entropy(x, labels_of(x)))

    def _gradient(self, name: str, value: Tensor) -> Any:
        """The gradient of a leaf, or of a tensor that was told to retain it; others are not asked."""
        return value.grad if name in self._retained or value.is_leaf else None

    def _observe(self, label: str, value: Callable[[], Any]) -> None:
        try:
            found = _copied(value())
        except Exception as e:
            found = e.with_traceback(None)
        self.observed.append((label, found))

    def _observe_held(self) -> None:
        """Counts the hidden states that losses hold which have had their backward, or have it now, or need none.

        A loss that is still to be differentiated may hold some, where plain PyTorch holds log-probabilities. This goes
        for a loss as well whose backward fails because that of another one has freed the graph that they share.
        """
        tensors = {n: self.names[n] for n in self.variables if isinstance(self.names[n], Tensor)}
        kept = [t for n, t in tensors.items() if t.dim() == 0 and (n in self._freed or _differentiated(t))]
        tensors.clear()
        kept_models = self.names["model"], self.names["other"]
        self.names.clear()
        self.names.update(kept=kept, models=kept_models)
        if not all(ref.expired() for ref in self._hidden.values()):
            gc.collect()
        held = sum(not ref.expired() for ref in self._hidden.values())
        self.observed.append(("hidden states held by losses", held))


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides of the dimensions in which there is more than one element; the others mean nothing."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def _differentiated(loss: Tensor) -> bool:
    """Runs the backward of a loss that requires a gradient; whether that went well.

    If it fails, what waited in autograd's queue of this thread would be held, so it has a thread of its own.
    """
    failed: list[bool] = []

    def backward() -> None:
        try:
            loss.backward()
        except Exception:
            failed.append(True)

    if loss.requires_grad:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    return not failed


def _modes_switched_off() -> int:
    """Switches off modes that a program has left on in this thread, and says how many there were."""
    left = torch._C._len_torch_function_stack()
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    return left


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        with torch.no_grad():
            return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return [_copied(v) for v in value]
    return value if isinstance(value, _SIMPLE) else type(value).__name__


class _Background:
    """A thread that trains and evaluates the program's model, and one that is not patched, until it is stopped."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.model, self.ids, self.labels = names["model"], names["ids"], names["labels"]
        self.results: list[list[Tensor]] = []
        self.error: Exception | None = None
        self.stopped = threading.Event()
        self.interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def _loop(self) -> None:
        until = time.monotonic() + 3
        while self.error is None and not self._had_enough(until):
            try:
                self.results.append(self._once())
            except Exception as e:
                self.error = e.with_traceback(None)

    def _had_enough(self, until: float) -> bool:
        """At least twice; eight times if there is time, and until the program ends if that is not too often."""
        count = len(self.results)
        late = time.monotonic() > until
        return count >= 2 and (late or count >= 40 or (count >= 8 and self.stopped.is_set()))

    def _once(self) -> list[Tensor]:
        model, ids, labels = self.model, self.ids, self.labels
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(ids, labels=labels).loss
        found = [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]
        with torch.no_grad():
            found.append(model(ids).logits)
        logits = model(ids).logits
        found += torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), parameters[-1:])
        twin = copy.deepcopy(model)
        found.append(twin(ids, labels=labels).loss.detach())
        plain = like(logits.detach())
        found.append(F.cross_entropy(plain.flatten(0, 1), labels.flatten()))
        return [torch.zeros(()) if t is None else t for t in found]

    def stop(self) -> Observed:
        self.stopped.set()
        self.thread.join()
        sys.setswitchinterval(self.interval)
        if self.error is not None:
            return [("error in the thread beside", self.error)]
        first = self.results[0]
        same = all(
            torch.allclose(a, b, rtol=1e-6, atol=1e-7) for r in self.results for a, b in zip(first, r, strict=True)
        )
        return [("results of the thread beside", first), ("results of the thread beside stay", same)]


def observe(program: Program, patch: Patch) -> Observed:
    """What the program shows on a model that `patch` has changed; None for the plain model."""
    run = Run(program.setting, patch)
    for statement in program.statements:
        run.step(statement)
    return run.finish()
