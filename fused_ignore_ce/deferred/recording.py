"""Recording: an operation on deferred logits makes others, with a node of their own in autograd's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import forms
from .affine import steps_of
from .expression import log_softmax_of
from .making import made
from .operations import CASTS, ELEMENTWISE, NORMALIZING
from .recipe import Recipe
from .shared_state import joint
from .values import Lazy, without_modes
from .views import View, no_view


def recorded(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Lazy]) -> Any:
    """The deferred result of an operation on these deferred logits; None if the operation is not recorded."""
    first = operands[0]
    if name == "detach":
        return _detached(func, first)
    for t in operands:
        if not t._can_be_fused():
            return None
    if name == "clone" and not first._requires_grad() and not first._shared.in_forward:
        return None  # a copy of detached logits is made to last
    try:
        with without_modes():
            form = forms.applied(func, name, [_form_of(a) for a in args], kwargs, None)
            if form is None or not _can_save(form, any(t._is_there() for t in operands)):
                return None
            meta = _meta_of(func, name, args, kwargs, form, first)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # an error of computed logits, too, or arguments that the operation's rule does not know
    is_new = name in ELEMENTWISE or name in NORMALIZING
    if meta is first._meta and not is_new:
        return first
    shared = first._shared if len(operands) == 1 else joint([t._shared for t in operands])
    if not isinstance(form, list):
        result = made(type(first), Recipe(func, name, args, kwargs), form, meta, first._device, shared)
        if not is_new and meta._is_view():
            result.becomes(View(first, func, args[1:], kwargs, None, torch.is_grad_enabled()))
        return result
    parts: list[Lazy] = []
    for i, (part, shape) in enumerate(zip(form, meta, strict=True)):
        parts.append(made(type(first), Recipe(func, name, args, kwargs, i), part, shape, first._device, shared))
        parts[-1].becomes(View(first, func, args[1:], kwargs, i, torch.is_grad_enabled()))
    return tuple(parts)


def _detached(func: Any, t: Lazy) -> Lazy:
    with torch.no_grad():
        recipe = Recipe(func, "detach", (t,), {})
    result = made(type(t), recipe, t._form, no_view(t._meta), t._device, t._shared)
    result.becomes(View(t, func, with_gradients=torch.is_grad_enabled()))
    return result


def _form_of(value: Any) -> Any:
    if isinstance(value, Lazy):
        return value._form
    return value.detach() if isinstance(value, Tensor) else value


def _can_save(form: Any, is_there: bool) -> bool:
    """Whether recording may save the computation of logits: those that are there are computed, but for a linear loss.

    So are those of a sharded head, which all ranks have to gather together, and not whenever one of them reads.
    """
    form = form[0] if isinstance(form, list) and form else form
    if not is_there:
        if isinstance(form, list) or form.product.layout == "plain":
            return True
        form = log_softmax_of(form) or form
    return isinstance(form, list) or steps_of(form) is not None


def _meta_of(func: Any, name: str, args: Any, kwargs: Any, form: Any, first: Lazy) -> Any:
    """A tensor without memory of the shape, the strides and the dtype of a result."""
    meta = first._meta
    if name in ELEMENTWISE and name != "masked_fill":  # keep shape and strides
        is_same = form.dtype == meta.dtype and meta.is_contiguous() and not meta._is_view()
        return meta if is_same else meta.to(form.dtype, copy=True)
    if name in ELEMENTWISE or name in NORMALIZING:
        return torch.empty(meta.shape, dtype=form.dtype, device="meta")
    if name in CASTS:
        found = forms.cast_of(name, args[1:], kwargs, first._form)
        return meta.to(form.dtype, copy=found is not None and found[1])
    if name == "index_select" or (name == "__getitem__" and _has_tensor(args[1])):
        return torch.empty(form.shape, dtype=meta.dtype, device="meta")
    return func(meta, *args[1:], **kwargs)


def _has_tensor(index: Any) -> bool:
    return isinstance(index, Tensor) or (isinstance(index, tuple) and any(isinstance(item, Tensor) for item in index))
