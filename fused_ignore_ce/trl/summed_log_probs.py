"""Log-probabilities whose caller is expected to sum them: their gradients come from forward, as a scalar loss's do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.eager import is_plain
from ..core.options import LossOptions, ReductionOptions
from ..core.reduction import LossStats, statistics
from ..core.rows import RowResults
from ..core.tensors import LinearTensors
from ..linear.calls import refuse_create_graph
from ..linear.grad_in_forward import ScaledSum, sum_function
from ..linear.kept_rows import Position
from ..linear.problem import linear_problem
from ..linear.row_results import rows_function
from ..losses.log_probs import fused_linear_log_probs


def summed_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    memory_budget: int | str | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LossStats]:
    """`fused_linear_log_probs(..., return_stats=True)`, in three matrix products if the loss is a multiple of the sum.

    Forward computes the gradients of the sum, and backward multiplies them by the upstream gradient, if that is the
    same number at every row; on CUDA it waits for the device to see this. If it is not, backward computes the logits
    again, as `fused_linear_log_probs` does. The gradients are right in both cases.
    """
    cap = None if softcap is None else softcap / temperature
    options = LossOptions(-100, softcap=cap, logit_scale=logit_scale / temperature).checked()
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    reduction = ReductionOptions("sum", None, True, acc).checked()
    tensors = LinearTensors(input, linear_weight, target, linear_bias, None, None)
    problem = linear_problem(tensors, (-100,), options, reduction, memory_budget, logits_dtype, backend, None)
    (position,) = problem.positions
    if not (problem.at_once and any(position.wanted) and is_plain(input)):
        per_token: tuple[Tensor, LossStats] = fused_linear_log_probs(
            input, linear_weight, target, linear_bias=linear_bias, softcap=softcap, logit_scale=logit_scale,
            temperature=temperature, memory_budget=memory_budget, logits_dtype=logits_dtype, return_stats=True,
            backend=backend,
        )  # fmt: skip
        return per_token
    found = _Summed.apply(position, *position.operands[:3])
    loss, lse, entropy, predicted = (problem.spread(values, position) for values in found)
    return (0.0 - loss).view(target.shape), statistics(problem.targets, reduction, loss, lse, predicted, entropy)


class _Summed(torch.autograd.Function):
    """(loss, lse, entropy, predicted) of all rows; the first is differentiable."""

    @staticmethod
    def forward(ctx: Any, position: Position, *operands: Tensor | None) -> tuple[Tensor, ...]:
        leaves = _leaves(operands, ctx.needs_input_grad[1:])
        rest: Any = position.operands[3:]
        assert position.scale is not None
        with torch.enable_grad():
            scale, wanted, call = position.scale, position.wanted, position.call
            found = ScaledSum(*sum_function(position.operands.h)(*leaves, *rest, *scale, wanted, call))
        ctx.sum = found.total, leaves
        # The operands are saved apart, by save_for_backward, which notices changes in place.
        ctx.rest, ctx.call = rest, position.call
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        results = (found.loss.detach(), found.lse.detach(), found.entropy.detach(), found.predicted)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_create_graph()
        operands, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        computed, ctx.sum = ctx.sum, None  # once: the gradients of a second backward are computed again
        if computed is not None and bool((dloss == dloss[:1]).all()):
            value, leaves = computed
            upstream = dloss[0] if len(dloss) else dloss.new_zeros(())
        else:
            leaves, upstream = _leaves(operands, needed), dloss
            with torch.enable_grad():
                value = RowResults(*rows_function(leaves[0])(*leaves, *ctx.rest, ctx.call)).loss
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(value, wanted, upstream))
        return None, *(next(gradients) if need else None for need in needed)


def _leaves(operands: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> list[Any]:
    return [None if t is None else t.detach().requires_grad_(need) for t, need in zip(operands, needed, strict=True)]
