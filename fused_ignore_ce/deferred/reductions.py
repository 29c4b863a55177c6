"""Operations that reduce the vocabulary. They evaluate an expression of logits tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .expression import ELEMENTWISE, Expression, can_record, describe, last_dim, made
from .origin import Origin
from .product import Product
from .tiles import by_tiles

#: name -> names of its first arguments after the logits
_SIGNATURES = {
    **dict.fromkeys(("sum", "mean", "logsumexp", "argmax", "argmin", "max", "min", "amax", "amin"), ("dim", "keepdim")),
    "topk": ("k", "dim"),
    "gather": ("dim", "index"),
    "take_along_dim": ("indices", "dim"),
}
#: An id that no target has, so that fused_linear_log_probs ignores none, as gather does not.
_NO_ID = torch.iinfo(torch.int32).min


def reduce(
    func: Callable[..., Any],
    name: str,
    recipe: Product | Expression,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    origin: Origin,
) -> Any:
    """The result of an operation, computed without logits; None if it does not reduce the vocabulary alone."""
    if name not in _SIGNATURES or not can_record(recipe) or len(args) > len(_SIGNATURES[name]):
        return None
    names = _SIGNATURES[name]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if not last_dim(recipe, kwargs.pop("dim", -1 if name == "topk" else None)) or "out" in kwargs:
        return None
    index = kwargs.pop("index", kwargs.pop("indices", None))
    if name in ("gather", "take_along_dim") and not _picks_classes(index, recipe, kwargs):
        return None
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    product = recipe if isinstance(recipe, Product) else recipe.product
    budget = origin.settings.options.get("memory_budget")
    kind = f"{name}({describe(recipe)})"
    if index is not None:
        found = _at(recipe, index, origin) if index.shape[-1] == 1 else None
        if found is None:
            found = by_tiles(made(torch.gather, name, (recipe, -1, index), {}), budget)
        else:
            found = found.to(recipe.dtype)
    else:
        position = kwargs.pop("k", None)
        first = (recipe, -1) if position is None else (recipe, position, -1)
        found = by_tiles(made(func, name, first, kwargs), budget)
    origin.took(kind, product.rows)
    if isinstance(found, tuple):
        values = [origin.guarded(value) for value in found]
        return getattr(torch.return_types, name)(values)
    return origin.guarded(found)


def _picks_classes(index: Any, recipe: Product | Expression, others: dict[str, Any]) -> bool:
    """Whether this is an index of some classes for every row."""
    is_index = isinstance(index, Tensor) and index.dim() > 1
    return is_index and index.shape[:-1] == recipe.shape[:-1] and not others


def _at(recipe: Any, index: Tensor, origin: Origin) -> Any:
    """`recipe.gather(-1, index)` for one index per row (..., 1); None where it takes more than one number per row.

    Elementwise operations commute with gather: they are applied to numbers that were gathered.
    """
    if isinstance(recipe, Product):
        before = recipe.before_log_softmax
        return recipe.at(index) if before is None else _log_probs(before, index, origin)
    if isinstance(recipe, Tensor) and recipe.dim() > 0:
        if recipe.shape[-1] == 1:
            return recipe
        return recipe[index] if recipe.dim() == 1 else recipe.gather(-1, index)
    if not isinstance(recipe, Expression):
        return recipe
    if recipe.name == "softmax" and isinstance(recipe.args[0], Product) and not recipe.kwargs:
        log_probs = _log_probs(recipe.args[0], index, origin)
        return None if log_probs is None else log_probs.exp()
    if recipe.name not in ELEMENTWISE and f"__{recipe.name}__" not in ELEMENTWISE:
        return None
    args = [_at(a, index, origin) for a in recipe.args]
    if any(found is None and a is not None for found, a in zip(args, recipe.args, strict=True)):
        return None
    return recipe.func(*args, **recipe.kwargs)


def _log_probs(logits: Product, index: Tensor, origin: Origin) -> Any:
    given = {k: v for k, v in origin.settings.options.items() if k in ("memory_budget", "backend")}
    return logits.log_probs(index, {"ignore_index": _NO_ID, **given})
