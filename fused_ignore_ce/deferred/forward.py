"""The forward of a patched transformers model: if labels are given, a `LossMode` is active while its head runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .logits import as_tensor
from .mode import LossMode
from .origin import Origin, Settings
from .report import COMPILED, Recorder
from .traced import TracedLogits


class _ProcessWide:
    def __init__(self) -> None:
        #: The settings of `patch_transformers`, for models that were not patched themselves; None while it is off.
        self.settings: Settings | None = None
        #: How many patched forwards, one inside another, torch.compile is tracing.
        self.traced = 0


process_wide = _ProcessWide()

#: The recorder of each model's logits since it was patched. It is neither pickled nor copied with the model.
_recorders: weakref.WeakKeyDictionary[nn.Module, Recorder] = weakref.WeakKeyDictionary()

#: Models for which a warning said that other code takes their loss.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def recorder_of(model: nn.Module, fresh: bool = False) -> Recorder:
    """The recorder of a model; a new one on the first call, or if it is to be `fresh`."""
    if fresh or model not in _recorders:
        _recorders[model] = Recorder()
        _warned.discard(model)
    return _recorders[model]


def patched_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)
    names = names[1:] if names[:1] == ("self",) else names

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = self.__dict__.get("_fused_ignore_ce") or process_wide.settings
        if settings is None:
            return original(self, *args, **kwargs)
        labels = _has_labels((*zip(names, args, strict=False), *kwargs.items()))
        trains = torch.is_grad_enabled() and (self.training or settings.without_labels)
        if not labels and not (trains and _is_outermost()):
            return original(self, *args, **kwargs)
        if not labels and not settings.without_labels:
            _refuse_options(self, settings)
            return original(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            origin = Origin(settings)
            origin.in_forward = True
            process_wide.traced += 1
            with LossMode(_classes(self), origin):
                outputs = original(self, *args, **kwargs)
            process_wide.traced -= 1
            return _as_tensors(outputs, self, settings, origin.used, origin.stats)
        if any(self is model for model, _ in _running.forwards):  # a subclass's forward, or the instance's, calls this
            return original(self, *args, **kwargs)
        origin = Origin(settings, recorder_of(self))
        mode = LossMode(_classes(self), origin)
        with _while_heads_run(self, mode):
            outputs = original(self, *args, **kwargs)
        if labels:
            mode.check_used(type(self).__name__)
            if not origin.used and not origin.fused:
                _warn_untaken(self, original, outputs)
        elif not origin.deferred:
            _refuse_options(self, settings)
        for _, outer in _running.forwards:
            outer.origin.used = outer.origin.used or origin.used
        return _as_tensors(outputs, self, settings, origin.used, origin.stats)

    return forward


def _is_outermost() -> bool:
    return not (process_wide.traced if torch.compiler.is_compiling() else _running.forwards)


def _refuse_options(model: nn.Module, settings: Settings) -> None:
    """Raises an error where a loss that is taken of plain logits after the forward would miss the options."""
    if not settings.changes:
        return
    what = (
        "its head is no matrix product" if settings.without_labels else "patch_model(..., without_labels=True) has it"
    )
    raise RuntimeError(
        f"{settings.changes}: given to patch_model, but {type(model).__name__} is trained without labels: its loss is "
        "taken after the forward (as by Trainer's label_smoothing_factor and compute_loss_func) of logits that do not "
        f"know of these options; {what}, or patch without them and give them to the loss yourself"
    )


def _warn_untaken(model: nn.Module, forward: Any, outputs: Any) -> None:
    """Warns once if other code took the loss of a patched model that was given labels, and names that code."""
    if model in _warned or _running.forwards:
        return
    _warned.add(model)
    name = _name_of(forward)
    node = _python_function(outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else None)
    warnings.warn(
        f"{type(model).__name__} is patched by fused_ignore_ce and was given labels, but its loss was taken by "
        f"{name}{node}, not by a cross entropy over logits that this package could compute: nothing was fused. "
        "Undo what replaced the model's forward, if something did, or call unpatch_model(model)"
        + "; for a trainer of TRL, fused_ignore_ce.trl.patch_trainer(trainer) fuses it"
        * name.startswith("trl."),
        stacklevel=3,
    )


def _name_of(forward: Any) -> str:
    """Module and name of the code that runs as a model's forward, without transformers' own decorators."""
    forward = getattr(forward, "_fused_ignore_ce_set", forward)  # a forward that was set on the instance
    while getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers.utils"):
        forward = forward.__wrapped__
    forward = getattr(forward, "__func__", forward)
    code = getattr(forward, "__code__", None)
    return type(forward).__name__ if code is None else f"{forward.__globals__['__name__']}.{code.co_name}"


def _python_function(loss: Any) -> str:
    """The first autograd.Function written in Python that a loss comes from."""
    nodes = [loss.grad_fn] if isinstance(loss, Tensor) and loss.grad_fn is not None else []
    for node in nodes:
        cls = getattr(node, "_forward_cls", None)
        if cls is not None:
            return f" ({cls.__module__}.{cls.__name__})"
        if len(nodes) < 50:
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return ""


class _Running(threading.local):
    """The models whose forwards are running in this thread, from the outermost."""

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, LossMode]] = []


_running = _Running()


def origin_in(model: nn.Module) -> Origin:
    """The origin of the forward that a model is running; a new one if the model is not patched."""
    running = (mode.origin for each, mode in _running.forwards if each is model)
    return next(running, None) or Origin(recorder=recorder_of(model))


def _has_labels(given: Any) -> bool:
    return any(is_label(name) and value is not None and value is not False for name, value in given)


def is_label(name: str) -> bool:
    """Whether a forward's argument of this name asks for a loss."""
    return "label" in name or name in ("start_positions", "end_positions")


def _classes(model: nn.Module) -> int | None:
    """The number of classes of the output embeddings, None if the model has none."""
    head = _output_embeddings(model)
    weight = getattr(head, "weight", None)
    if hasattr(weight, "ds_id"):
        raise RuntimeError(
            "patch_model: the head's weight is partitioned by DeepSpeed ZeRO-3, which takes it away again before the "
            "loss; use ZeRO-2 or FSDP2, or unpatch_model(model) and model.loss_function = fused_causal_lm_loss"
        )
    classes = getattr(head, "out_features", None)
    if classes is None and isinstance(weight, Tensor) and weight.dim() == 2:
        classes = weight.shape[0]
    return classes


def _output_embeddings(model: Any) -> nn.Module | None:
    """The output embeddings of the model, or else those of a model inside it."""
    from transformers.modeling_utils import PreTrainedModel  # Dynamo of PyTorch 2.11 cannot trace a lazy module

    head = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        return head
    inner = (_output_embeddings(child) for child in model.children() if isinstance(child, PreTrainedModel))
    return next((found for found in inner if found is not None), None)


def has_head(model: nn.Module) -> bool:
    return _output_embeddings(model) is not None


@contextlib.contextmanager
def _while_heads_run(model: nn.Module, mode: LossMode) -> Iterator[None]:
    """Activates the mode for this model, but not while models inside it run, unless they hold the head.

    A mode costs a Python call per operation, so it is not active while the layers of an inner model run. It starts when
    the output embeddings are called, or a child that is neither a model nor an embedding, or when an inner model has
    returned.
    """
    from transformers import PreTrainedModel

    def start(*_: Any) -> None:
        if _running.forwards[-1][1] is mode:  # not while a model inside takes the loss itself
            mode.start()

    def stop(*_: Any) -> None:
        mode.stop()

    handles = []
    for child in model.children():
        if isinstance(child, PreTrainedModel):
            handles += [child.register_forward_pre_hook(stop), child.register_forward_hook(start)]
        elif not isinstance(child, nn.Embedding):
            handles.append(child.register_forward_pre_hook(start))
    head = _output_embeddings(model)
    if head is not None:
        handles.append(head.register_forward_pre_hook(start))
    if not handles:
        mode.start()
    _running.forwards.append((model, mode))
    mode.origin.in_forward = True
    try:
        yield
    finally:
        mode.origin.in_forward = False
        _running.forwards.pop()
        mode.stop()
        for handle in handles:
            handle.remove()


def _as_tensors(outputs: Any, model: nn.Module, settings: Settings, used: bool, stats: Any) -> Any:
    """Turns traced logits into tensors. This happens outside of the graph, which cannot make them."""
    values = outputs.values() if isinstance(outputs, dict) else outputs
    traced = not isinstance(values, Tensor) and any(isinstance(v, TracedLogits) for v in values)
    return _outside(outputs, model, settings, used, stats) if traced or stats is not None else outputs


@torch.compiler.disable(reason="a patched model breaks the graph once, at its end: compile it without fullgraph=True")
def _outside(outputs: Any, model: nn.Module, settings: Settings, used: bool, stats: Any) -> Any:
    def as_deferred(value: Any) -> Any:
        if not isinstance(value, TracedLogits):
            return value
        made = as_tensor(value, Origin(settings, recorder_of(model)))
        if used:
            made._origin.took(f"cross_entropy {COMPILED}", value._product.rows)
        return made

    if not isinstance(outputs, dict):
        if stats is not None:
            raise ValueError("return_stats: the forward returned a tuple, which has no place; pass return_dict=True")
        return type(outputs)(map(as_deferred, outputs))
    for name, value in list(outputs.items()):
        outputs[name] = as_deferred(value)
    if stats is not None:
        object.__setattr__(outputs, "loss_stats", stats)
    return outputs
