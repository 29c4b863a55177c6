"""Recording: an operation on deferred logits makes others, with a node of their own."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from . import forms
from .expression import ELEMENTWISE, NORMALIZING
from .origin import joint
from .product import Product
from .recipe import Recipe
from .recording import RECORDERS
from .values import Lazy, deferred_in, flat, made, without_modes

#: The closed list of operations that are recorded. Comparisons are none of them.
RECORDED = frozenset({*RECORDERS, *ELEMENTWISE, *NORMALIZING})


def recorded(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The deferred result of an operation; None if the operation is not recorded."""
    operands = list(deferred_in(args))
    if not operands or any(not t._can_be_fused() for t in operands) or len(list(deferred_in((kwargs,)))):
        return None if name != "detach" else _recorded_detach(func, args[0])
    if name == "detach":
        return _recorded_detach(func, args[0])
    first = operands[0]
    if name == "clone" and not first._requires_grad() and not first._origin.in_forward:
        return None  # a copy of detached logits is made to last
    recipe = Recipe(func, name, args, kwargs)
    values = [t._form if isinstance(t, Lazy) else t.detach() for t in recipe.inputs]
    with torch.no_grad():
        form = forms.applied(recipe, values)
    if form is None or (not _is_affine(form) and any(t._is_there() for t in operands)):
        return None
    try:
        with torch.no_grad(), without_modes():
            meta = _meta_of(func, name, args, kwargs, form, first)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # it is an error for computed logits, too
    if meta is first._meta and args[0] is first:
        return first
    origin = first._origin if len(operands) == 1 else joint([t._origin for t in operands])
    if not isinstance(form, list):
        result = made(type(first), recipe, form, meta, origin)
        if meta._is_view():
            _is_view(result, first, func, args[1:], kwargs)
        return result
    parts: list[Lazy] = []
    for i, (part, shape) in enumerate(zip(form, meta, strict=True)):
        recipe = Recipe(func, name, args, kwargs, part=i)
        parts.append(made(type(first), recipe, part, shape, origin))
        _is_view(parts[-1], first, func, args[1:], kwargs, i)
    return tuple(parts)


def _is_affine(form: Any) -> bool:
    return isinstance(form, list) or (isinstance(form, Product) and form.before_log_softmax is None)


def _recorded_detach(func: Any, t: Lazy) -> Lazy:
    with torch.no_grad():
        recipe = Recipe(func, "detach", (t,), {})
        result = made(type(t), recipe, t._form, t._meta, t._origin)
    _is_view(result, t, func, (), {})
    return result


def _is_view(view: Lazy, base: Lazy, func: Any, args: Any, kwargs: Any, part: Any = None) -> None:
    view._view_of = base, func, args, kwargs, part, torch.is_grad_enabled()
    base._views.append(weakref.ref(view))


_STEPS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "tanh",
                    "add", "__add__", "__radd__", "sub", "subtract", "__sub__", "log_softmax", "to", "type_as", "float",
                    "double", "half", "bfloat16"})  # fmt: skip


def _meta_of(func: Any, name: str, args: Any, kwargs: Any, form: Any, first: Lazy) -> Any:
    """Shape and strides of a result: those that the operation gives for a tensor without memory."""
    if isinstance(form, list):
        return list(func(first._meta, *args[1:], **kwargs))
    same_shape = form.shape == first._meta.shape
    is_cast = name in ("float", "double", "half", "bfloat16", "to", "type_as")
    if is_cast and form.dtype == first._meta.dtype and not (kwargs.get("copy") or (args[2:] and args[-1] is True)):
        return first._meta
    if same_shape and (name in _STEPS or name in ELEMENTWISE or name in NORMALIZING):
        if first._meta.is_contiguous() or name in NORMALIZING:
            return torch.empty(form.shape, dtype=form.dtype, device="meta")
        return torch.empty_strided(form.shape, (first._meta * 1).stride(), dtype=form.dtype, device="meta")
    if any(isinstance(t, Tensor) for t in flat(args[1:])) or name == "index_select":
        return torch.empty(form.shape, dtype=form.dtype, device="meta")
    return func(first._meta, *args[1:], **kwargs)


def relaid(t: Lazy, func: Any, layout: str, args: tuple[Any, ...], kwargs: dict[str, Any], cls: Any) -> Lazy:
    """Deferred logits of a sharded head in another layout over the ranks."""
    recipe = Recipe(func, f"layout {layout}", args, kwargs)
    return made(cls, recipe, t._form._replace(layout=layout), t._meta, t._origin)
