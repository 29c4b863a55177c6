"""Operations that are not recorded: they work on the computed logits, and may write to them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .gradient import dense_of
from .graph import Adopt, connected
from .making import deferred_in, wrapped
from .operations import MEMORY, NATIVE
from .saving import shares_memory
from .shared_state import SharedState
from .values import Lazy
from .views import View

_plainly = torch._C.DisableTorchFunctionSubclass


def differentiated(func: Any, outputs: Any, inputs: Any = None, materialize_grads: bool = False, **kwargs: Any) -> Any:
    """torch.autograd.grad or backward, with places in the graph for deferred logits; gradients returned are computed.

    Torch functions stay switched on, for Python that a backward runs, such as a checkpoint's.
    """

    def place(t: Any) -> Any:
        if t._has_moved():
            return t._aliased(func.__name__)
        with _plainly():
            if t.requires_grad and func is torch.autograd.backward and any(t is each for each in inputs or ()):
                t.retain_grad()
            return torch.autograd.graph.get_gradient_edge(t)

    replace = torch.utils._pytree.tree_map_only
    kwargs = replace(Lazy, lambda t: t.materialize(func.__name__), kwargs)
    if materialize_grads:
        kwargs["allow_unused"] = True
    found = func(replace(Lazy, place, outputs), inputs=replace(Lazy, place, inputs), **kwargs)
    if found is None:
        return None
    if materialize_grads:
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
    return tuple(dense_of(g) for g in found)


def of_values(func: Any, name: str, args: Any, kwargs: Any, deferred: list[Lazy]) -> Any:
    """The result of an operation on the computed logits."""
    is_metadata = name in NATIVE

    def value(t: Lazy) -> Tensor:
        found = t._aliased(name) if t._stands_alone() or name in MEMORY else t.materialize(name)
        return found

    values = {id(t): value(t) for t in deferred}
    first = args[0] if args else None
    if is_metadata and isinstance(first, Lazy):
        found = func(values[id(first)], *replaced(args[1:], values), **replaced(kwargs, values))
        if name == "grad" and found is None:
            with _plainly():
                found = func(*args, **kwargs)
        return first if found is values[id(first)] else found
    out = func(*replaced(args, values), **replaced(kwargs, values))
    lent = [member for t in deferred for member in t._family()] if name in MEMORY else []
    for member in lent:
        member._aliased(name)
    for member in lent:  # not before all of them share the memory
        member._is_lent = True
    for t in deferred:
        if out is values[id(t)]:
            return t

    def again(t: Lazy, value: Tensor) -> Any:
        by = values | {id(t): value}
        return func(*replaced(args, by), **replaced(kwargs, by))

    def result(o: Any, part: int | None = None) -> Any:
        for t in deferred:
            if name not in MEMORY and type(o) is Tensor and shares_memory(o, values[id(t)]):
                view = View(t, functools.partial(again, t), part=part, with_gradients=torch.is_grad_enabled())
                return _as_deferred(o, shared or t._shared, type(t), view)
        return o if shared is None else _with_options(o, shared, type(deferred[0]))

    shared = next((t._shared for t in deferred if t._shared.changes), None)
    if type(out) in (tuple, list):
        return type(out)([result(o, i) for i, o in enumerate(out)])
    return result(out)


def _with_options(value: Any, shared: SharedState, cls: Any) -> Any:
    """A tensor that was computed from logits of a model with options that its losses must take.

    If it may be logits itself, cross entropies of it take the options. Else, a gradient that arrives at it is an error.
    """
    if type(value) is not Tensor or not value.is_floating_point():
        return value
    if shared.classes not in value.shape:
        shared.guard(value)
        return value
    return _as_deferred(value, shared, cls)


def _as_deferred(value: Tensor, shared: SharedState, cls: Any, view: View | None = None) -> Any:
    """A computed tensor as deferred logits; `view` says of which others it is a part, as a write to it changes them."""
    made: Lazy = connected(Adopt, wrapped(cls, value, value.device, shared), value)
    made._value, made._is_written, made._is_moved = value, True, True
    if view is not None:
        made.becomes(view)
    return made


def replaced(values: Any, by: dict[int, Tensor]) -> Any:
    if isinstance(values, Lazy):
        return by[id(values)]
    if type(values) in (tuple, list):
        return type(values)([replaced(v, by) for v in values])
    if type(values) is dict:
        return {k: replaced(v, by) for k, v in values.items()}
    return values


def written(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Writes to the computed logits, which stand for the deferred ones from then on, as do their views."""
    deferred = deferred_in((args, kwargs))
    target = kwargs.get("out") if isinstance(kwargs.get("out"), Lazy) else args[0]
    values = {id(t): t._aliased(name) for t in deferred}
    sources = dict(values)  # with their own places in the graph, also where they share memory with the target
    family = target._family() if isinstance(target, Lazy) else []
    if family:
        values |= family[0]._views_of_each_other()
        for reference in family[0]._saved:
            if (saved := reference()) is not None:
                saved.copy()
        first = values[id(family[0])]
        place = first.grad_fn
    if target is args[0] and torch._debug_has_internal_overlap(values.get(id(target), target)) != 1:
        args = (values.get(id(target), target), *replaced(args[1:], sources))
    out = func(*replaced(args, values), **replaced(kwargs, values))
    is_recorded = bool(family) and first.grad_fn is not place
    for member in family:
        member._is_written = True
        if is_recorded or member._view is not None:
            member._move(values[id(member)])
    for t in deferred:
        if out is values[id(t)]:
            return t
    return out
