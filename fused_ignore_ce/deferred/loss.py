"""`F.cross_entropy` and similar losses as this package computes them, of tensors and of deferred logits."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.eager import is_tracing
from ..core.options import ignored_ids
from ..core.reduction import LossStats
from ..core.tensors import LogitsTensors
from ..losses.causal_lm import aligned_with_logits, as_normalizer, check_vocab_size, fused_causal_lm_loss
from ..losses.cross_entropy import fused_cross_entropy
from . import affine
from .expression import log_softmax_of
from .shared_state import SharedState


def cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    shared: SharedState,
) -> Any:
    """`F.cross_entropy(input, target, ...)` with the options that `shared` has."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": weight,
    }
    options = shared.extended(options, target)
    if shared.divisor is not None and reduction == "sum" and not target.is_floating_point():
        none_kept = _are_ignored(target, options).all().to(shared.divisor.device)
        shared.divisor.masked_fill_(none_kept & (shared.divisor == 0), 1)
    if hasattr(input, "take_loss"):
        loss = _linear(input, target, options, shared, "cross_entropy")
        if loss is not None:
            return loss
    options = _of_logits(options)
    shared.took_of_logits("cross_entropy", target.numel(), _ignored(target, options))
    return shared.without_stats(_of_values(input, target, options | shared.asked_stats(), "cross_entropy"))


def nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    shared: SharedState,
) -> Any:
    """`F.nll_loss` of deferred logits: the cross entropy, if they are log-probabilities."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if not target.is_floating_point():
        options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight}
        loss = _linear(input, target, shared.settings.extend(options, target), shared, "nll_loss(log_softmax)")
        if loss is not None:
            shared.used = True
            return loss
    log_probs = input.materialize("nll_loss")
    loss = torch.nn.functional.nll_loss(log_probs, target, weight, ignore_index=ignore_index, reduction=reduction)
    shared.guard(loss)
    return loss


def own_cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    shared: SharedState,
    kind: str = "fused_cross_entropy",
    **options: Any,
) -> Any:
    """`fused_cross_entropy(input, target, ...)` with the options that `shared` has."""
    changed = {n: value for n, value in options.items() if isinstance(value, Tensor) or value != _DEFAULTS[n]}
    options = shared.extended({"ignore_index": -100, **changed, "weight": weight}, target)
    if hasattr(input, "take_loss") and options.get("process_group") is None:
        linear = {name: value for name, value in options.items() if name not in _OF_LOGITS}
        loss = _linear(input, target, linear, shared, kind)
        if loss is not None:
            return loss
    options = _of_logits(options)
    shared.took_of_logits(kind, target.numel(), _ignored(target, options))
    loss = _of_values(input, target, shared.asked_stats() | options, kind)
    return loss if "return_stats" in options else shared.without_stats(loss)


def causal_lm_loss(
    logits: Any,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: Any = -100,
    shift_labels: Tensor | None = None,
    *,
    shared: SharedState,
    **options: Any,
) -> Any:
    """`fused_causal_lm_loss(logits, labels, ...)` with the options that `shared` has."""
    check_vocab_size(vocab_size, logits)
    ids, shifted = ignored_ids(ignore_index), shift_labels is not None
    labels = shift_labels if shift_labels is not None else labels
    assert labels is not None, "checked by the function that was called"
    weight, token_weight = options.pop("weight", None), options.pop("token_weight", None)
    tensors = LogitsTensors(logits, labels, weight, token_weight)
    (logits, target, _, token_weight), shape = aligned_with_logits(tensors, ids[0], shifted=shifted)
    options["loss_dtype"] = options.get("loss_dtype") or torch.promote_types(logits.dtype, torch.float32)
    options["normalizer"] = as_normalizer(num_items_in_batch, logits.device)
    options["token_weight"] = None if token_weight is None else token_weight.flatten()
    options |= {"ignore_index": ids, "shared": shared, "kind": "fused_causal_lm_loss"}
    found = own_cross_entropy(logits.flatten(0, -2), target.flatten(), weight, **options)
    loss, stats = found if isinstance(found, tuple) else (found, None)
    loss = loss.view(shape) if loss.dim() else loss
    return loss if stats is None else (loss, LossStats(*(t.view(shape) if t.dim() else t for t in stats)))


def _linear(input: Any, target: Tensor, options: dict[str, Any], shared: SharedState, kind: str) -> Any:
    """The linear loss, None where it cannot express these logits."""
    asked = "return_stats" in options
    options = shared.asked_stats() | options
    of_log_probs = kind == "nll_loss(log_softmax)"
    tensors = {"target": target, **options}
    names = [name for name, value in tensors.items() if isinstance(value, Tensor) and value.requires_grad]

    def lean(form: Any, *given: Tensor) -> Any:
        form = log_softmax_of(form) if of_log_probs else form
        return None if form is None else affine.cross_entropy(form, **_with(given))

    def dense(values: Tensor, *given: Tensor) -> Any:
        return (_nll if of_log_probs else _on_logits)(values, **_with(given))

    def _with(given: tuple[Tensor, ...]) -> dict[str, Any]:
        replaced = {**tensors, **dict(zip(names, given, strict=True))}
        return {"target": replaced.pop("target"), "options": replaced}

    loss = input.take_loss(lean, dense, [tensors[name] for name in names])
    if loss is None:
        return None
    shared.took(kind, input.shape.numel() // max(1, input.classes), _ignored(target, options))
    return loss if asked else shared.without_stats(loss)


def _on_logits(values: Tensor, target: Tensor, options: dict[str, Any]) -> Any:
    return fused_cross_entropy(values, target, **_of_logits(options))


def _of_logits(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a loss of logits has, too."""
    return {name: value for name, value in options.items() if name not in _OF_HIDDEN_STATES}


def _nll(values: Tensor, target: Tensor, options: dict[str, Any]) -> Any:
    """The loss of log-probabilities. Their normaliser is 0, so that a loss of logits with options is theirs, too."""
    ids = ignored_ids(options["ignore_index"])
    if options.keys() <= {"weight", "ignore_index", "reduction", "backend", *_OF_HIDDEN_STATES} and len(ids) == 1:
        return torch.nn.functional.nll_loss(
            values, target, options.get("weight"), ignore_index=ids[0], reduction=options["reduction"]
        )
    return _on_logits(values, target, options)


def _of_values(input: Any, target: Tensor, options: dict[str, Any], kind: str) -> Any:
    """The loss of logits, which are computed if they are deferred."""
    if not hasattr(input, "take_loss"):
        return fused_cross_entropy(input, target, **options)
    values = input.materialize(kind)
    with getattr(input, "saving", contextlib.nullcontext)():
        return fused_cross_entropy(values, target, **options)


def _ignored(target: Tensor, options: dict[str, Any]) -> Tensor | None:
    """How many targets are ignored, on their device; None where they are not counted."""
    counted = not target.is_floating_point() and not is_tracing()
    return _are_ignored(target, options).sum() if counted else None


def _are_ignored(target: Tensor, options: dict[str, Any]) -> Tensor:
    first, *others = ignored_ids(options["ignore_index"])
    found = target == first
    for index in others:
        found = found | (target == index)
    return found


#: The options of `fused_cross_entropy` and their defaults, and those of them that only a loss of logits has.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(fused_cross_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_OF_LOGITS = ("inplace_backward", "grad_in_forward")
#: Those that only a loss of hidden states has.
_OF_HIDDEN_STATES = ("memory_budget", "logits_dtype")

#: The losses that are computed here, by the function whose calls they replace.
LOSSES: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.cross_entropy: cross_entropy,
    torch.nn.functional.nll_loss: nll_loss,
    fused_cross_entropy: own_cross_entropy,
    fused_causal_lm_loss: causal_lm_loss,
}
