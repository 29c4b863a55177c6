"""The forward of a patched transformers model: when labels come, a `LossMode` is on while its head runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .logits import as_tensor
from .mode import LossMode, names_of
from .traced import TracedLogits


class Settings(NamedTuple):
    """What `patch_model` was given."""

    ignore_index: tuple[int, ...]
    options: dict[str, Any]


class _ProcessWide:
    """The settings of models that were not patched themselves; None for none."""

    settings: Settings | None = None


process_wide = _ProcessWide()


def patched_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)
    names = names[1:] if names[:1] == ("self",) else names

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = self.__dict__.get("_fused_ignore_ce") or process_wide.settings
        if settings is None:
            return original(self, *args, **kwargs)
        if not _has_labels((*zip(names, args, strict=False), *kwargs.items())):
            _warn_without_labels(self, settings)
            return original(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            with LossMode(_classes(self), settings.ignore_index, settings.options):
                outputs = original(self, *args, **kwargs)
            return _as_tensors(outputs)
        if any(self is model for model, _ in _running.forwards):  # a subclass's forward, or the instance's, calls this
            return original(self, *args, **kwargs)
        mode = LossMode(_classes(self), settings.ignore_index, settings.options)
        with _while_heads_run(self, mode):
            outputs = original(self, *args, **kwargs)
        mode.check_used(type(self).__name__)
        for _, outer in _running.forwards:
            outer.used = outer.used or mode.used
        return _as_tensors(outputs)

    return forward


def _warn_without_labels(model: nn.Module, settings: Settings) -> None:
    """Whoever takes the loss outside of the model's forward does it without the options."""
    if torch.compiler.is_compiling() or _running.forwards or not (model.training and torch.is_grad_enabled()):
        return
    given = names_of(*settings)
    if given:
        warnings.warn(
            f"{given}: given to patch_model, but {type(model).__name__} is trained without labels, so its "
            "loss is taken elsewhere, without them (as by Trainer's label_smoothing_factor and compute_loss_func)",
            stacklevel=3,
        )


class _Running(threading.local):
    """The models whose forward this thread is in, from the outermost."""

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, LossMode]] = []


_running = _Running()


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
    """The model's, or else those of a model inside it."""
    from transformers import PreTrainedModel

    head = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        return head
    inner = (_output_embeddings(child) for child in model.children() if isinstance(child, PreTrainedModel))
    return next((found for found in inner if found is not None), None)


@contextlib.contextmanager
def _while_heads_run(model: nn.Module, mode: LossMode) -> Iterator[None]:
    """The mode, but not while the models inside this one run, unless they hold the head.

    A mode costs a Python call an operation: layers run at full speed, as they would without it. It begins when a
    module that is no model is called, or the output embeddings, or when an inner model has returned.
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
    try:
        yield
    finally:
        _running.forwards.pop()
        mode.stop()
        for handle in handles:
            handle.remove()


def _as_tensors(outputs: Any) -> Any:
    """What was traced becomes tensors: outside of the graph, which cannot make them."""
    values = outputs.values() if isinstance(outputs, dict) else outputs
    if isinstance(values, Tensor) or not any(isinstance(v, TracedLogits) for v in values):
        return outputs
    return _outside(outputs)


@torch.compiler.disable
def _outside(outputs: Any) -> Any:
    if not isinstance(outputs, dict):
        return type(outputs)(as_tensor(v) if isinstance(v, TracedLogits) else v for v in outputs)
    for name, value in list(outputs.items()):
        if isinstance(value, TracedLogits):
            outputs[name] = as_tensor(value)
    return outputs
