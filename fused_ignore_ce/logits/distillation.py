"""Distillation from the logits of both sides. Forward reads both once; backward reads both and writes one gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.choice import distiller
from ..backends.divergences import DistilledRows, Teacher, saved_like
from ..core.batches import loops_over_batches
from ..core.distillation import DistillationOptions, refuse_create_graph
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, schema_of, unflatten
from ..core.tensors import rows_of

_TENSORS = "Tensor x, Tensor teacher, Tensor target"
_CALL = f"str backend, {schema_of(DistillationOptions)}"


def _forward(
    x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, backend: str, *scalars: Any
) -> tuple[Tensor, ...]:
    """The fields of `DistilledRows`, and what backward needs of them."""
    options, kernels = unflatten(DistillationOptions, scalars), distiller(backend, x.device)
    rows, saved = kernels.forward(rows_of(x), Teacher(rows_of(teacher)), target, options, with_stats=with_stats)
    return (*rows, saved)


def _backward(
    dloss: Tensor, x: Tensor, teacher: Tensor, target: Tensor, saved: Tensor, backend: str, *scalars: Any
) -> Tensor:
    x, shape = rows_of(x), x.shape
    dx, options = torch.empty_like(x), unflatten(DistillationOptions, scalars)
    kernels = distiller(backend, x.device)
    kernels.backward(dloss, x, Teacher(rows_of(teacher)), target, saved, options, dx=dx)
    return dx.view(shape)


_forward_operator = torch.library.custom_op(
    f"{PACKAGE}::distillation",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, bool with_stats, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_operator = torch.library.custom_op(
    f"{PACKAGE}::distillation_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dloss, {_TENSORS}, Tensor saved, {_CALL}) -> Tensor",
)


@_forward_operator.register_fake
def _(x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, backend: str, *_: Any) -> tuple[Tensor, ...]:
    rows = DistilledRows.zeros(x, target.shape[0], with_stats)
    return (*rows, saved_like(rows.loss, backend))


@_backward_operator.register_fake
def _(dloss: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows_of(x)).view(x.shape)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scalars: tuple[Any, ...], x: Tensor, teacher: Tensor, target: Tensor) -> Any:
        *rows, saved = (_forward if is_plain(x) else _forward_operator)(x, teacher, target, *scalars)
        ctx.scalars = scalars[1:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rows[1:])
        ctx.save_for_backward(x, teacher, target, saved)
        return tuple(rows)

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, dloss: Any, *_: Any) -> Any:
        if dloss is None:
            return None, None, None, None
        refuse_create_graph()
        x, *others = ctx.saved_tensors
        dx = (_backward if is_plain(x) else _backward_operator)(dloss, x, *others, *ctx.scalars)
        return None, dx, None, None


def distilled(
    x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, backend: str, options: DistillationOptions
) -> DistilledRows:
    """The results of the N rows of x (..., V); their loss is differentiable with respect to x.

    Logits come as the caller gave them: Inductor does not notice a write to a tensor of which a view is saved.
    """
    return DistilledRows(*_Function.apply((with_stats, backend, *flatten(options)), x, teacher, target))
