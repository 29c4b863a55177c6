"""Operations on rows of logits and slices of the vocabulary, as operations on hidden states, weights and vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .expression import Form, is_normalized, operands_of, products_of, substitute
from .product import Product


class _Rows(NamedTuple):
    """What an operation does to hidden states (..., D), to vectors over the classes, and to the order of dimensions."""

    move: Callable[[Tensor], Any]
    classes: slice = slice(None)
    classes_second: bool = False


def on_rows(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The form after an operation on rows, a list of forms if that gives several tensors; None if it is no such one."""
    form, *rest = args
    if form.classes_second and name not in _REORDERS:
        return None
    if name in _REORDERS:
        rule = _reordered(form, func, rest, kwargs)
    elif name in _ALONG:
        rule = _along(form, func, name, rest, kwargs)
    else:
        rule = _RULES[name](form, *rest, **kwargs)
    return None if rule is None else _moved(form, rule)


def _moved(form: Form, rule: _Rows) -> Any:
    whole, tensors = rule.classes == slice(None), {}
    if whole and isinstance(form, Product):  # the usual case
        found = rule.move(form.hidden)
        if isinstance(found, Tensor):
            return form._replace(hidden=found, classes_second=rule.classes_second)
    products, operands = list(products_of(form)), list(operands_of(form))
    if any(t.dim() > 1 for t in operands):
        return None
    if not whole and is_normalized(form):  # each class depends on those that are cut off
        return None
    hidden = {id(p.hidden): p.hidden for p in products}
    moved: dict[int, Any] = {i: rule.move(h) for i, h in hidden.items()}
    if not whole:
        vectors = [t for t in operands if t.shape == form.product.weight.shape[:1]]
        tensors = {id(t): t[rule.classes] for t in (*vectors, *(t for p in products for t in p.tensors[1:]))}
    first = moved[id(form.product.hidden)]
    if isinstance(first, Tensor):
        return substitute(form, {**tensors, **moved}, rule.classes_second)
    parts = [{i: hidden[part] for i, hidden in moved.items()} for part in range(len(first))]
    return [substitute(form, {**tensors, **part}, rule.classes_second) for part in parts]


def _getitem(form: Form, index: Any) -> _Rows | None:
    """An index that leaves the vocabulary whole, or slices it."""
    ndim = form.product.hidden.dim()
    items = list(index) if isinstance(index, tuple) else [index]
    taken, has_ellipsis = 0, False
    for item in items:
        if isinstance(item, (list, bool)):
            return None
        has_ellipsis = has_ellipsis or item is Ellipsis
        taken += _dimensions_of(item)
    if taken > ndim:
        return None
    if not has_ellipsis:
        items.append(Ellipsis)
    classes = slice(None)
    if items[-1] is not Ellipsis or taken == ndim:  # the last slice is the vocabulary's
        if items[-1] is Ellipsis:
            items.pop()
        if not isinstance(items[-1], slice):
            return None
        classes, items[-1] = items[-1], slice(None)
    return _Rows(lambda h: h[tuple(items)], classes)


def _dimensions_of(item: Any) -> int:
    """How many dimensions an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _reshape(form: Form, *sizes: Any, **kwargs: Any) -> _Rows | None:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if kwargs or not sizes or any(isinstance(size, torch.dtype) for size in sizes):
        return None
    lead, last, V = sizes[:-1], sizes[-1], form.product.weight.shape[0]
    if last == -1:
        last = form.product.rows * V // max(1, math.prod(lead))
    if last != V or last == 0:
        return None
    return _Rows(lambda h: h.reshape(*lead, h.shape[-1]))


def _unsqueeze(form: Form, dim: int) -> _Rows | None:
    ndim = form.product.hidden.dim()
    dim = dim if dim >= 0 else dim + ndim + 1
    return None if dim == ndim else _Rows(lambda h: h.unsqueeze(dim))


def _narrow(form: Form, dim: int, start: Any, length: int) -> _Rows | None:
    if dim % len(form.shape) != len(form.shape) - 1:
        return _Rows(lambda h: h.narrow(dim, start, length))
    if not isinstance(start, int):
        return None
    start = start if start >= 0 else start + form.shape[-1]
    return _Rows(lambda h: h, slice(start, start + length))


#: name -> rule(form, *args, **kwargs), which says what the operation does to hidden states, None if it cannot.
_RULES: dict[str, Callable[..., _Rows | None]] = {
    "__getitem__": _getitem, "view": _reshape, "reshape": _reshape, "unsqueeze": _unsqueeze, "narrow": _narrow,
}  # fmt: skip
#: The dimensions that an operation names, for those that do the same to hidden states if none of these is the last.
_ALONG: dict[str, Callable[..., tuple[Any, ...]]] = {
    "flatten": lambda start_dim=0, end_dim=-1: (start_dim, end_dim),
    "squeeze": lambda dim=None: (dim,),
    "select": lambda dim, index: (dim,),
    "index_select": lambda dim, index: (dim,),
    "unbind": lambda dim=0: (dim,),
    "split": lambda split_size, dim=0: (dim,),
    "chunk": lambda chunks, dim=0: (dim,),
}
_REORDERS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")


def _along(form: Form, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> _Rows | None:
    ndim = form.product.hidden.dim()
    for dim in _ALONG[name](*args, **kwargs):
        if not isinstance(dim, int) or dim % ndim == ndim - 1:
            return None
    return _Rows(lambda h: func(h, *args, **kwargs))


def _reordered(form: Form, func: Any, args: Any, kwargs: dict[str, Any]) -> _Rows | None:
    """The logits with their dimensions in another order: the classes are last, or come second."""
    last = len(form.shape) - 1
    strides = [2**d for d in range(last + 1)]  # after the operation, they tell which dimension is where
    order = func(torch.empty_strided([2] * len(strides), strides, device="meta"), *args, **kwargs).stride()
    before = 1 if form.classes_second else last
    after = order.index(strides[before])
    if after not in (1, last):
        return None
    rows = [d - (d > before) for d in map(strides.index, order) if d != before]
    return _Rows(lambda h: h.permute(*rows, last), classes_second=after != last)
