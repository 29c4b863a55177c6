"""Operations that reduce the vocabulary. They evaluate an expression of logits tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .expression import ELEMENTWISE, Expression, can_record, last_dim, made
from .origin import Origin
from .product import Product
from .tiles import by_tiles, rows_of_tile

#: name -> names of its first arguments after the logits
_SIGNATURES = {
    **dict.fromkeys(("sum", "mean", "logsumexp", "argmax", "argmin", "max", "min", "amax", "amin"), ("dim", "keepdim")),
    "topk": ("k", "dim"),
    "gather": ("dim", "index"),
    "take_along_dim": ("indices", "dim"),
}
#: An id that no target has, so that fused_linear_log_probs ignores none, as gather does not.
_NO_ID = torch.iinfo(torch.int32).min


class Reduction(NamedTuple):
    """An operation that reduces the vocabulary: its keywords, and the index or the number of places it takes."""

    func: Callable[..., Any]
    name: str
    kwargs: dict[str, Any]
    of_index: Tensor | None
    k: int | None

    def of(self, form: Product | Expression, origin: Origin) -> Any:
        """The result, computed tile by tile."""
        budget = origin.settings.options.get("memory_budget")
        if self.of_index is not None:
            one_each, rows = self.of_index.shape[-1] == 1, form.shape[:-1].numel()
            if one_each and rows > rows_of_tile(form.shape[-1], budget):
                found = _at(form, self.of_index, origin)
                if found is not None:
                    return found.to(form.dtype)
            return by_tiles(made(torch.gather, self.name, (form, -1, self.of_index), {}), budget)
        first = (form, -1) if self.k is None else (form, self.k, -1)
        found = by_tiles(made(self.func, self.name, first, self.kwargs), budget)
        return getattr(torch.return_types, self.name)(found) if isinstance(found, tuple) else found

    def dense(self, values: Tensor) -> Any:
        """The result, computed from all values."""
        if self.of_index is not None:
            return values.gather(-1, self.of_index)
        return self.func(values, -1, **self.kwargs) if self.k is None else self.func(values, self.k, -1, **self.kwargs)


def reduction(func: Callable[..., Any], name: str, form: Any, args: Any, kwargs: dict[str, Any]) -> Reduction | None:
    """The operation, if it reduces the vocabulary alone; None otherwise."""
    if name not in _SIGNATURES or not can_record(form) or len(args) > len(_SIGNATURES[name]):
        return None
    kwargs = {**dict(zip(_SIGNATURES[name], args, strict=False)), **kwargs}
    if not last_dim(form, kwargs.pop("dim", -1 if name == "topk" else None)):
        return None
    index = kwargs.pop("index", kwargs.pop("indices", None))
    if name in ("gather", "take_along_dim") and not _picks_classes(index, form, kwargs):
        return None
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    return Reduction(func, name, kwargs, index, kwargs.pop("k", None))


def _picks_classes(index: Any, recipe: Product | Expression, others: dict[str, Any]) -> bool:
    """Whether this is an index of some classes for every row."""
    is_index = isinstance(index, Tensor) and index.dim() > 1
    return is_index and index.shape[:-1] == recipe.shape[:-1] and not others


def _at(recipe: Any, index: Tensor, origin: Origin) -> Any:
    """`recipe.gather(-1, index)` for one index per row (..., 1); None where it takes more than one number per row.

    It is for logits of more than one tile. In one tile, a gather is a part of what others see, to the last bit. Here,
    log-probabilities are the fused function's. Elementwise operations commute with gather: they are applied to numbers
    that were gathered. Logits themselves are gathered from the tiles that every reader of them sees.
    """
    if isinstance(recipe, Product):
        before = recipe.before_log_softmax
        return None if before is None else _log_probs(before, index, origin)
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
