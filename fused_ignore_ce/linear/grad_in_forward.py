"""A scaled sum of row losses from hidden states. Its gradients come from forward: three matrix products.

It is an autograd.Function in eager mode, and an operator in tracing. In backward, both only scale the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice import scaled
from ..core.batches import is_batched, loops_over_batches
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, unflatten
from ..core.reduction import scaled_total
from ..core.rows import RowResults, fake_results
from .calls import CALL_SCHEMA, OPERANDS, OPERANDS_SCHEMA, LinearCall, refuse_create_graph, tiles_of
from .flops import tell_counters
from .gradients import Wanted
from .sweep import Scale, losses_and_gradients
from .tiles import Operands


class ScaledSum(NamedTuple):
    """The sum of `scale.rows * loss + scale.rows_z * z_loss * lse**2`, and the results of its rows.

    Only the sum is differentiable.
    """

    total: Tensor  # 0-d
    loss: Tensor
    lse: Tensor
    entropy: Tensor
    predicted: Tensor
    target_weight: Tensor
    likeliest: Tensor
    # The gradients for an upstream gradient of 1; empty where not needed.
    dh: Tensor
    dw: Tensor
    db: Tensor


def _summed(results: RowResults, gradients: Sequence[Tensor | None], scale: Scale, call: LinearCall) -> ScaledSum:
    total = scaled_total(results.loss, results.lse, *scale, call.options.z_loss)
    of_rows = (results.loss, results.lse, results.entropy, results.predicted)
    given = [total.new_empty(0) if each is None else each for each in gradients[:3]]
    return ScaledSum(total, *of_rows, results.target_weight, results.likeliest, *given)


@torch.library.custom_op(
    f"{PACKAGE}::linear_cross_entropy_sum",
    mutates_args=(),
    schema=f"({OPERANDS_SCHEMA}, Tensor scale, Tensor? scale_z, bool need_dh, bool need_dw, bool need_db, "
    f"{CALL_SCHEMA}) -> (" + ", ".join(["Tensor"] * len(ScaledSum._fields)) + ")",
)
def _operator(*args: Any) -> tuple[Tensor, ...]:
    operands, scale = Operands(*args[:OPERANDS]), Scale(*args[OPERANDS : OPERANDS + 2])
    need_dh, need_dw, need_db, *scalars = args[OPERANDS + 2 :]
    wanted, call = Wanted(need_dh, need_dw, need_db), unflatten(LinearCall, tuple(scalars))
    return tuple(_summed(*losses_and_gradients(tiles_of(operands, call, wanted), scale, wanted), scale, call))


@_operator.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    operands, scale = Operands(*args[:OPERANDS]), Scale(*args[OPERANDS : OPERANDS + 2])
    *needed, call = *args[OPERANDS + 2 : OPERANDS + 5], unflatten(LinearCall, args[OPERANDS + 5 :])
    results = fake_results(operands.h, operands.h.shape[0], call, operands.weight, operands.probs)
    gradients = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip(operands[:3], needed, strict=True)
    ]
    return tuple(_summed(results, gradients, scale, call))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    results = ScaledSum(*output)
    ctx.save_for_backward(results.loss, results.lse, results.dh, results.dw, results.db)
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dtotal: Any, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dtotal is None:
        return tuple(gradients)
    refuse_create_graph()
    loss, lse, *found = ctx.saved_tensors  # accessed only once, see CrossEntropyRows
    for i, gradient in enumerate(found):
        if ctx.needs_input_grad[i]:
            gradients[i] = scaled(gradient, dtotal, ctx.backend, keep=is_batched(ctx))
    if ctx.needs_input_grad[OPERANDS]:
        gradients[OPERANDS] = loss * dtotal
    if ctx.needs_input_grad[OPERANDS + 1]:
        gradients[OPERANDS + 1] = lse.square() * (ctx.z_loss * dtotal)
    return tuple(gradients)


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    call = unflatten(LinearCall, inputs[OPERANDS + 5 :])
    ctx.z_loss, ctx.backend = call.options.z_loss, call.backend


_operator.register_autograd(_backward, setup_context=_save_operator)


class _Function(torch.autograd.Function):
    """The operator's forward and backward for plain tensors in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        operands, scale = Operands(*inputs[:OPERANDS]), Scale(*inputs[OPERANDS : OPERANDS + 2])
        wanted, call = inputs[OPERANDS + 2 :]
        output = tuple(_summed(*losses_and_gradients(tiles_of(operands, call, wanted), scale, wanted), scale, call))
        _save(ctx, inputs, output)
        ctx.z_loss, ctx.backend = call.options.z_loss, call.backend
        return output

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *gradients)


def sum_function(h: Tensor) -> Callable[..., Any]:
    """The function that gives the fields of `ScaledSum` for (*operands, *scale, wanted, call)."""
    return _Function.apply if is_plain(h) else _traced


def _traced(*args: Any) -> Any:
    tell_counters()
    *tensors, wanted, call = args
    return _operator(*tensors, *wanted[:3], *flatten(call))
