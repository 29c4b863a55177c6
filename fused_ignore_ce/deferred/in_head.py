"""Losses and reductions of deferred logits, taken in a call of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import forms
from .affine import describe
from .graph import Fused, Work, connected
from .recipe import Recipe, autocast, autocast_state, is_deferred, of_graph
from .reductions import reduction
from .saving import saving_parameters
from .values import Lazy


class InHead:
    """What a head computes in place of its logits, when it is called with this as its second argument."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute
        self.was_called = False

    def __call__(self) -> Any:
        self.was_called = True
        return self._compute()


def take(inputs: list[Lazy], operands: list[Tensor], lean: Any, dense: Any) -> Any:
    """`dense(*values of inputs, *operands)`, computed by `lean(*forms of inputs, *operands)`; None if that gives None.

    It runs in a call of the head's module, so that whoever gathers its weights around calls has them there.
    """
    if not all(t._can_be_fused() for t in inputs):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        needs = [torch.is_grad_enabled() and t.requires_grad for t in (*inputs, *operands)]
    state = autocast_state(inputs[0]._device.type)

    def as_called(*values: Tensor) -> Any:
        with autocast(state):
            return dense(*values)

    def compute() -> Any:
        leaves = forms.Leaves()
        detached = [t.detach().requires_grad_(n) for t, n in zip(operands, needs[len(inputs) :], strict=True)]
        gradients = torch.set_grad_enabled(any(needs))
        with gradients, torch._C.DisableTorchFunctionSubclass(), saving_parameters(leaves.parameters):
            found = [leaves.form(t, n) for t, n in zip(inputs, needs, strict=False)]
            result = None if any(form is None for form in found) else lean(*found, *detached)
        if result is None or not any(needs):
            return result
        results, spec = torch.utils._pytree.tree_flatten(result)
        held = [of_graph(t, n) for t, n in zip(inputs, needs, strict=False)]
        work = Work(results, leaves.found, detached, held, needs, as_called)
        made = connected(Fused, work, *inputs, *operands, holders=work.holders)
        return torch.utils._pytree.tree_unflatten(made, spec)

    root = _root(inputs[0]._recipe)
    if root.head is None:
        return compute()
    inside = InHead(compute)
    found = root.head(root.inputs[0], inside)
    return (
        found if inside.was_called else compute()
    )  # hooks of tensor parallelism pass the hidden states on, and no more


def _root(recipe: Recipe) -> Recipe:
    while recipe.product is None:
        recipe = next(t for t in recipe.inputs if is_deferred(t))._recipe
    return recipe


def reduced(func: Any, name: str, t: Lazy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that reduces the vocabulary, computed by tiles; None for other operations."""
    work = reduction(func, name, t._form, args, kwargs)
    if work is None or t._is_there():
        return None
    shared = t._shared
    found = take([t], [], lambda form: work.of(form, shared), work.dense)
    if found is None:
        return None
    shared.took(f"{name}({describe(t._form)})", t._form.product.rows)
    for value in found if isinstance(found, tuple) else (found,):
        shared.guard(value)
    return getattr(torch.return_types, name)(found) if isinstance(found, tuple) else found
