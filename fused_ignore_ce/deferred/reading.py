"""Operations that are not recorded: they work on the computed logits, and may write to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradient import dense_of
from .graph import Adopt, connected
from .names import MEMORY, NATIVE
from .origin import Origin
from .values import Lazy, deferred_in, flat, shares_memory, wrapped

_plainly = torch._C.DisableTorchFunctionSubclass


def differentiated(func: Any, outputs: Any, inputs: Any = None, materialize_grads: bool = False, **kwargs: Any) -> Any:
    """torch.autograd.grad or backward, with places in the graph for deferred logits; gradients returned are computed.

    Torch functions stay switched on, for Python that a backward runs, such as a checkpoint's.
    """

    def place(t: Any) -> Any:
        if t._stands_alone():
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
    if any(shares_memory(o, values[id(t)]) for t in deferred if t._view_of is not None for o in flat([out])):
        values = {id(t): t._aliased(name) for t in deferred}
        out = func(*replaced(args, values), **replaced(kwargs, values))
    for t in deferred:
        if out is values[id(t)]:
            return t
    origin = next((t._origin for t in deferred if t._origin.changes), None)
    return (
        out
        if origin is None
        else torch.utils._pytree.tree_map_only(Tensor, lambda t: _with_options(t, origin, type(deferred[0])), out)
    )


def _with_options(value: Tensor, origin: Origin, cls: Any) -> Tensor:
    """A tensor that was made of the logits, for code whose loss the options have to reach.

    If it may be logits itself, it still takes losses. Else, a gradient that arrives at it is an error.
    """
    if not value.is_floating_point() or type(value) is not Tensor:
        return value
    if origin.classes not in value.shape:
        origin.guard(value)
        return value
    made = connected(Adopt, wrapped(cls, value, value.device, origin), value)
    made._value, made._is_written = value, True
    result: Lazy = made
    return result


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
    deferred = list(deferred_in((args, kwargs)))
    target = kwargs.get("out") if isinstance(kwargs.get("out"), Lazy) else args[0]
    family = target._family() if isinstance(target, Lazy) else []
    values = {id(t): t._aliased(name) for t in (*deferred, *family)}
    for reference in family[0]._saved if family else ():
        if (saved := reference()) is not None:
            saved.copy()
    out = func(*replaced(args, values), **replaced(kwargs, values))
    was_enabled = torch.is_grad_enabled()
    for member in family:
        value = values[id(member)]
        member._is_written = True
        with _plainly(), torch.enable_grad():
            if member._view_of is not None and member._view_of[4] is not None:
                continue  # one of several results: PyTorch lets nobody touch it once its base was written to
            if (was_enabled or member._requires_grad()) and value.requires_grad:
                connected(Adopt, member, value)
                if member.retains_grad and not value.retains_grad:
                    value.retain_grad()
    for t in deferred:
        if out is values[id(t)]:
            return t
    return out
