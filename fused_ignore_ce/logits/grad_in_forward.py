"""A scalar loss of logits whose gradient is computed along with it, so that the logits are read once.

The gradient is held until backward, which multiplies it by whatever upstream gradient comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import choice as backends
from ..core.operators import is_plain, wants_grad
from ..core.reduction import Scales, scaled_total
from ..core.rows import Logits, Rows, Upstream
from .problem import LogitsProblem
from .row_results import RowCall

#: Writes the gradient into a tensor; returns (total, a factor for backward to multiply it by or None, statistics).
Compute = Callable[[Tensor], tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]


class GradInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Compute, inplace: bool, backend: str) -> tuple[Tensor, ...]:
        dx = x.detach() if inplace else torch.empty_like(x)
        total, factor, statistics = compute(dx)
        if inplace:
            torch.autograd.graph.increment_version(x)
        ctx.save_for_backward(x if inplace else dx, factor)
        ctx.backend = backend
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return total, *statistics

    @staticmethod
    def backward(ctx: Any, dtotal: Any, *_: Any) -> tuple[Tensor | None, ...]:
        if dtotal is None:
            return (None,) * 4
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True is not supported with grad_in_forward=True: pass grad_in_forward=False"
            )
        dx, factor = ctx.saved_tensors
        return backends.scaled(dx.detach(), dtotal, ctx.backend, factor), None, None, None


def total_with_gradient(logits: Logits, scales: Scales, call: RowCall, inplace: bool) -> tuple[Tensor, ...]:
    """(scaled total, lse, predicted, entropy); only the total is differentiable, in the logits."""
    x = logits.x
    kernels = backends.implementation(call.backend, x.device)
    if logits.probs is None:
        backends.check_targets(logits.target, call.options.ignore_index, x.shape[-1])

    def compute(dx: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        scale, z_scale, factor = scales.loss, scales.z_loss, None
        if x.dtype == torch.float16 and scales.divisor is not None:
            # Divided in backward: gradients as small as 1 / N would be rounded to 0 before a loss scale enlarges them.
            divisor = torch.as_tensor(scales.divisor, dtype=scale.dtype, device=x.device)
            divisor = torch.where(divisor == 0.0, 1.0, divisor)  # 0 if no row is kept: gradients of 0 then remain 0
            scale, z_scale = scale * divisor, None if z_scale is None else z_scale * divisor
            factor = 1.0 / divisor
        rows = Rows(
            *kernels.forward_backward(
                Upstream(scale), logits, call.options, dx=dx, dz=z_scale, with_stats=call.with_stats
            )
        )
        total = scaled_total(rows.loss, rows.lse, scales.loss, scales.z_loss, call.options.z_loss)
        return total, factor, (rows.lse, rows.predicted, rows.entropy)

    found: tuple[Tensor, ...] = GradInForward.apply(x, compute, inplace, call.backend)
    return found


def can_compute_in_forward(problem: LogitsProblem) -> bool:
    """Whether the scale of every row is known in forward, and logits are all that the loss is differentiated in."""
    input, targets, reduction = problem.tensors.input, problem.targets, problem.reduction
    constants = (problem.probs, targets.token_weight, reduction.normalizer)
    return (
        problem.call.group is None
        and reduction.reduction != "none"
        and reduction.return_stats != "differentiable"
        and is_plain(input)
        and wants_grad(input)
        and not any(isinstance(t, Tensor) and t.requires_grad for t in constants)
    )
