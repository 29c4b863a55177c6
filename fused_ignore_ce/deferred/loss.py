"""`F.cross_entropy` as this package computes it, of logits that are there and of those that are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import fused_cross_entropy


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
    extra: dict[str, Any] | None = None,
) -> Tensor:
    """`F.cross_entropy(input, target, ...)`, with further options of `fused_linear_cross_entropy` in `extra`."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": weight,
        **(extra or {}),
    }
    if hasattr(input, "_product"):
        product = input._usable_product()
        loss = None if product is None else product.cross_entropy(target, options)
        if loss is not None:
            input._take_loss()
            return loss
        input = input.materialize()
    options.pop("memory_budget", None)
    return fused_cross_entropy(input, target, **options)


def nll_loss(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    extra: dict[str, Any] | None = None,
) -> Tensor:
    """`F.nll_loss` of deferred logits: the cross entropy, if they are log-probabilities."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    product = input._usable_product()
    logits = None if product is None else product.before_log_softmax
    if logits is not None and not target.is_floating_point():
        options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight, **(extra or {})}
        loss = logits.cross_entropy(target, options)
        if loss is not None:
            input._take_loss()
            return loss
    return torch.nn.functional.nll_loss(
        input.materialize(), target, weight, ignore_index=ignore_index, reduction=reduction
    )


#: What is computed here, by the function of PyTorch's whose calls it takes.
LOSSES = {torch.nn.functional.cross_entropy: cross_entropy, torch.nn.functional.nll_loss: nll_loss}
