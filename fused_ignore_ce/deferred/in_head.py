"""Losses and reductions of deferred logits, taken in a call of the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import divergences, forms
from .affine import describe
from .graph import Fused, Work, connected
from .head_call import in_call_of_head
from .recipe import autocast, autocast_state, of_graph
from .recording import recorded
from .reductions import reduction
from .saving import saving_parameters
from .values import Lazy


def take(inputs: list[Lazy], operands: list[Tensor], lean: Any, dense: Any) -> Any:
    """`dense(*values of inputs, *operands)`, computed by `lean(*forms of inputs, *operands)`; None if that gives None.

    If the head's weights are not there, it runs in a call of the head's module, for which they are gathered.
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

    return in_call_of_head(inputs[0]._recipe, compute)


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


def summed_divergence(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Lazy]) -> Any:
    """`F.kl_div` with a reduction to a scalar, without logits; None if it cannot be recorded or is asked for rows."""
    reduction = kwargs.get("reduction")
    if reduction not in ("sum", "batchmean"):
        return None
    terms = recorded(func, "kl_div", args, {**kwargs, "reduction": "none"}, operands)
    if terms is None:
        return None
    total = None
    if divergences.divergence(terms._form) is not None and not terms._is_there():
        shared = terms._shared
        options = shared.of_rows
        total = take([terms], [], lambda form: divergences.loss(form, "sum", options), Tensor.sum)
        if total is not None:
            shared.took(f"sum({describe(terms._form)})", terms._form.product.rows)
            shared.guard(total)
    if total is None:
        total = terms.sum(-1).sum()
    divided = reduction == "batchmean" and args[0].dim() > 0  # by the rows of the first operand, also if it has fewer
    return total / args[0].shape[0] if divided else total
