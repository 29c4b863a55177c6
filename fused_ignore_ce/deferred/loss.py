"""`F.cross_entropy` as this package computes it, of logits that are there and of those that are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import fused_cross_entropy
from .origin import Origin


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
    origin: Origin,
) -> Any:
    """`F.cross_entropy(input, target, ...)` with the options of the model that `origin` stands for."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": weight,
    }
    options = origin.settings.extend(options, target)
    if hasattr(input, "_product"):
        loss = _linear(input, input._usable_product(), target, options, origin, "cross_entropy")
        if loss is not None:
            return loss
        input = input.materialize("cross_entropy")
    options.pop("memory_budget", None)
    origin.took_of_logits("cross_entropy", target.numel(), _ignored(target, options))
    return origin.without_stats(fused_cross_entropy(input, target, **(options | origin.asked_stats())))


def nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    origin: Origin,
) -> Any:
    """`F.nll_loss` of deferred logits: the cross entropy, if they are log-probabilities."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    product = input._usable_product()
    logits = None if product is None else product.before_log_softmax
    if logits is not None and not target.is_floating_point():
        options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight}
        options = origin.settings.extend(options, target)
        loss = _linear(input, logits, target, options, origin, "nll_loss(log_softmax)")
        if loss is not None:
            return loss
    log_probs = origin.guarded(input.materialize("nll_loss"))
    return torch.nn.functional.nll_loss(log_probs, target, weight, ignore_index=ignore_index, reduction=reduction)


def _linear(input: Any, product: Any, target: Tensor, options: dict[str, Any], origin: Origin, kind: str) -> Any:
    """The linear loss, None where it cannot express these logits."""
    if product is None:
        return None
    loss = product.cross_entropy(target, options | origin.asked_stats())
    if loss is None:
        return None
    origin.took(kind, product.rows, _ignored(target, options))
    return input._connected(origin.without_stats(loss))


def _ignored(target: Tensor, options: dict[str, Any]) -> Tensor | None:
    """How many targets are ignored, on their device; None where nobody counts them."""
    if target.is_floating_point() or torch.compiler.is_compiling():
        return None
    ids = options["ignore_index"]
    found = None
    for index in ids if isinstance(ids, tuple) else (ids,):
        found = target == index if found is None else found | (target == index)
    return None if found is None else found.sum()


#: What is computed here, by the function of PyTorch's whose calls it takes.
LOSSES = {torch.nn.functional.cross_entropy: cross_entropy, torch.nn.functional.nll_loss: nll_loss}
