"""Distillation from the logits of both sides. Forward reads both once; backward reads both and writes one gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import divergences
from ..backends.divergences import DistilledRows, Teacher
from ..core.batches import loops_over_batches
from ..core.distillation import DistillationOptions, refuse_create_graph
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, schema_of, unflatten
from ..core.tensors import rows_of

_TENSORS = "Tensor x, Tensor teacher, Tensor target"


def _forward(x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, *scalars: Any) -> tuple[Tensor, ...]:
    options = unflatten(DistillationOptions, scalars)
    return tuple(divergences.rows(rows_of(x), Teacher(rows_of(teacher)), target, options, with_stats=with_stats))


def _backward(dloss: Tensor, x: Tensor, teacher: Tensor, target: Tensor, *scalars: Any) -> Tensor:
    x, teacher, shape = rows_of(x), rows_of(teacher), x.shape
    dx = torch.empty_like(x)
    options = unflatten(DistillationOptions, scalars)
    divergences.rows(x, Teacher(teacher), target, options, with_stats=False, scale=dloss, dx=dx)
    return dx.view(shape)


_forward_operator = torch.library.custom_op(
    f"{PACKAGE}::distillation",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, bool with_stats, {schema_of(DistillationOptions)}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_operator = torch.library.custom_op(
    f"{PACKAGE}::distillation_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dloss, {_TENSORS}, {schema_of(DistillationOptions)}) -> Tensor",
)


@_forward_operator.register_fake
def _(x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, *scalars: Any) -> tuple[Tensor, ...]:
    return tuple(DistilledRows.zeros(x, target.shape[0], with_stats))


@_backward_operator.register_fake
def _(dloss: Tensor, x: Tensor, teacher: Tensor, target: Tensor, *scalars: Any) -> Tensor:
    return torch.empty_like(rows_of(x)).view(x.shape)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scalars: tuple[Any, ...], x: Tensor, teacher: Tensor, target: Tensor) -> Any:
        rows = (_forward if is_plain(x) else _forward_operator)(x, teacher, target, *scalars)
        ctx.scalars = scalars[1:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rows[1:])
        ctx.save_for_backward(x, teacher, target)
        return rows

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, dloss: Any, *_: Any) -> Any:
        if dloss is None:
            return None, None, None, None
        refuse_create_graph()
        x, teacher, target = ctx.saved_tensors
        dx = (_backward if is_plain(x) else _backward_operator)(dloss, x, teacher, target, *ctx.scalars)
        return None, dx, None, None


def distilled(
    x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, options: DistillationOptions
) -> DistilledRows:
    """The results of the N rows of x (..., V); their loss is differentiable with respect to x.

    Logits come as the caller gave them: Inductor does not notice a write to a tensor of which a view is saved.
    """
    return DistilledRows(*_Function.apply((with_stats, *flatten(options)), x, teacher, target))
