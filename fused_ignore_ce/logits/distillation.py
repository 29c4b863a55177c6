"""Distillation from the logits of both sides. Forward reads both once; backward reads both and writes one gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.choice import distiller
from ..backends.divergences import DistilledRows, Teacher, saved_like
from ..core.distillation import DistillationOptions, refuse_create_graph
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, schema_of, unflatten

_TENSORS = "Tensor x, Tensor teacher, Tensor target"
_CALL = f"str backend, {schema_of(DistillationOptions)}"


def _forward(
    x: Tensor, teacher: Tensor, target: Tensor, with_stats: bool, backend: str, *scalars: Any
) -> tuple[Tensor, ...]:
    """The fields of `DistilledRows`, and what backward needs of them."""
    options, kernels = unflatten(DistillationOptions, scalars), distiller(backend, x.device)
    rows, saved = kernels.forward(x, Teacher(teacher), target, options, with_stats=with_stats)
    return (*rows, saved)


def _backward(
    dloss: Tensor, x: Tensor, teacher: Tensor, target: Tensor, saved: Tensor, backend: str, *scalars: Any
) -> Tensor:
    dx, options = torch.empty_like(x), unflatten(DistillationOptions, scalars)
    distiller(backend, x.device).backward(dloss, x, Teacher(teacher), target, saved, options, dx=dx)
    return dx


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
    return torch.empty_like(x)


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
    """The results of rows x (N, V); their loss is differentiable with respect to x."""
    return DistilledRows(*_Function.apply((with_stats, backend, *flatten(options)), x, teacher, target))
