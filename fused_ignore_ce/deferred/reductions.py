"""Operations that reduce the vocabulary. They evaluate an expression of logits tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import affine, divergences
from .expression import Expression, Form, is_form, is_of_classes, log_softmax_of, products_of
from .operations import ELEMENTWISE
from .recipe import autocast_state
from .shared_state import SharedState
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

    def of(self, form: Form, shared: SharedState) -> Any:
        """The result, computed tile by tile."""
        budget = shared.of_rows.get("memory_budget")
        divergence = divergences.loss(form, "none", shared.of_rows) if self._is_sum else None
        if divergence is not None:
            return self._like_a_sum(divergence, form)
        rest = form.dtype, form.product, autocast_state(form.product.hidden.device.type)
        if self.of_index is not None:
            one_each, rows = self.of_index.shape[-1] == 1, form.product.rows
            if one_each and rows > rows_of_tile(form.shape[-1], budget):
                found = _at(form, self.of_index, shared)
                if found is not None:
                    return found.to(form.dtype)
            return by_tiles(Expression(torch.gather, self.name, (form, -1, self.of_index), {}, *rest), budget)
        args: Any = (form, -1) if self.k is None else (form, self.k, -1)
        found = by_tiles(Expression(self.func, self.name, args, self.kwargs, *rest), budget)
        return getattr(torch.return_types, self.name)(found) if isinstance(found, tuple) else found

    @property
    def _is_sum(self) -> bool:
        dtype = self.kwargs.get("dtype")  # integers would be made of the terms, before they are summed
        is_floating = dtype is None or dtype.is_floating_point
        return self.name in ("sum", "mean") and self.kwargs.keys() <= {"keepdim", "dtype"} and is_floating

    def _like_a_sum(self, rows: Tensor, form: Form) -> Tensor:
        """Sums over the classes as this operation gives them."""
        like = self.func(torch.empty(0, dtype=form.dtype, device=rows.device), -1, **self.kwargs)  # autocast decides
        rows = (rows / form.shape[-1] if self.name == "mean" else rows).to(like.dtype)
        return rows.unsqueeze(-1) if self.kwargs.get("keepdim") else rows

    def dense(self, values: Tensor) -> Any:
        """The result, computed from all values."""
        if self.of_index is not None:
            return values.gather(-1, self.of_index)
        return self.func(values, -1, **self.kwargs) if self.k is None else self.func(values, self.k, -1, **self.kwargs)


def reduction(func: Callable[..., Any], name: str, form: Form, args: Any, kwargs: dict[str, Any]) -> Reduction | None:
    """The operation, if it reduces the vocabulary alone; None otherwise."""
    if name not in _SIGNATURES or not _has_tiles(form) or len(args) > len(_SIGNATURES[name]):
        return None
    kwargs = {**dict(zip(_SIGNATURES[name], args, strict=False)), **kwargs}
    if not is_of_classes(form, kwargs.pop("dim", -1 if name == "topk" else None)):
        return None
    index = kwargs.pop("index", kwargs.pop("indices", None))
    if name in ("gather", "take_along_dim") and not _picks_classes(index, form, kwargs):
        return None
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    return Reduction(func, name, kwargs, index, kwargs.pop("k", None))


def _has_tiles(form: Form) -> bool:
    """Whether the logits have rows, with more than one class each, that are computed from plain tensors."""
    shape = form.shape
    plain = all(p.layout == "plain" for p in products_of(form))
    return len(shape) > 1 and shape[-1] > 1 and plain and not form.classes_second


def _picks_classes(index: Any, form: Form, others: dict[str, Any]) -> bool:
    """Whether this is an index of some classes for every row."""
    is_index = isinstance(index, Tensor) and index.dim() > 1
    return is_index and index.shape[:-1] == form.shape[:-1] and not others


def _at(form: Any, index: Tensor, shared: SharedState) -> Any:
    """`form.gather(-1, index)` for one index per row (..., 1); None where it takes more than one number per row.

    It is for logits of more than one tile; a single tile is computed, and gathered from. Log-probabilities come from
    `fused_linear_log_probs`. Elementwise operations are applied to the gathered numbers, which gives the same. Logits
    themselves are gathered from the tiles that every other reader gets, so that all see the same bits.
    """
    if isinstance(form, Tensor) and form.dim() > 0:
        if form.shape[-1] == 1:
            return form
        return form[index] if form.dim() == 1 else form.gather(-1, index)
    if not is_form(form):
        return form
    if (logits := log_softmax_of(form)) is not None:
        return _log_probs(logits, index, shared)
    if not isinstance(form, Expression):
        return None
    if form.name == "softmax" and not form.kwargs:
        log_probs = _log_probs(form.args[0], index, shared)
        return None if log_probs is None else log_probs.exp()
    if form.name not in ELEMENTWISE and f"__{form.name}__" not in ELEMENTWISE and form.name != "to":
        return None
    args = [_at(a, index, shared) for a in form.args]
    if any(found is None and a is not None for found, a in zip(args, form.args, strict=True)):
        return None
    return form.func(*args, **form.kwargs)


def _log_probs(logits: Form, index: Tensor, shared: SharedState) -> Any:
    return affine.log_probs(logits, index, {"ignore_index": _NO_ID, **shared.of_rows})
