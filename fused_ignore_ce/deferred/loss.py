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
