"""A scalar loss of logits whose gradient is computed along with it, so that the logits are read once.

The gradient is held until backward, which multiplies it by whatever upstream gradient comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choice
from ..core.batches import is_batched, loops_over_batches
from ..core.reduction import scaled_total, scales, weight_of_target
from ..core.rows import Logits, Rows, Upstream, classes_last
from .kernel_reduction import as_rows
from .problem import LogitsProblem


class Computed(NamedTuple):
    """What forward computes beside the gradient."""

    total: Tensor  # the loss
    factor: Tensor | None  # by which backward has to multiply the gradient, beside the upstream gradient
    of_rows: Tensor  # their losses, without z-loss and token weights
    lse: Tensor
    predicted: Tensor
    entropy: Tensor
    num_tokens: Tensor | None  # None if the kernel did not count


def loss_reduced_by_kernel(problem: LogitsProblem) -> Any:
    """The loss, or (loss, LossStats); the loss is differentiable in the logits."""
    x = as_rows(problem.tensors.input, problem.classes_dim)
    total, *statistics, num_tokens = GradInForward.apply(x, _reduced_by_kernel, problem)
    return problem.result(total, *statistics, num_tokens=num_tokens)


def loss_reduced_by_pytorch(problem: LogitsProblem) -> Any:
    """As `loss_reduced_by_kernel`, on any backend and with any option."""
    x = classes_last(problem.tensors.input, problem.classes_dim)
    total, *statistics, _ = GradInForward.apply(x, _reduced_by_pytorch, problem)
    return problem.result(total, *statistics)


class GradInForward(torch.autograd.Function):
    """Returns the fields of `Computed` without the factor; the first is differentiable, in the logits x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[LogitsProblem, Tensor, Tensor], Computed], problem: LogitsProblem
    ) -> tuple[Tensor | None, ...]:
        inplace = problem.inplace_backward
        dx = x.detach() if inplace else torch.empty_like(x)
        total, factor, *statistics = compute(problem, x, dx)
        if inplace:
            torch.autograd.graph.increment_version(x)
        ctx.save_for_backward(dx, factor)
        ctx.backend = problem.call.backend
        ctx.mark_non_differentiable(*(each for each in statistics if each is not None))
        ctx.set_materialize_grads(False)
        return total, *statistics

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, dtotal: Any, *_: Any) -> tuple[Tensor | None, ...]:
        if dtotal is None:
            return None, None, None
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph: expected False with grad_in_forward=True, got True; pass grad_in_forward=False"
            )
        dx, factor = ctx.saved_tensors
        return choice.scaled(dx.detach(), dtotal, ctx.backend, factor, keep=is_batched(ctx)), None, None


def _reduced_by_kernel(problem: LogitsProblem, x: Tensor, dx: Tensor) -> Computed:
    """Writes the gradient into `dx`."""
    _, targets, call, reduction, loss_dtype, classes_dim, *_ = problem
    probs = as_rows(problem.probs, classes_dim)
    kernels: Any = choice.implementation(call.backend, x.device)
    if probs is None:
        choice.check_targets(targets.target, call.options.ignore_index, x.shape[-1])
    # Divided in backward: gradients as small as 1 / N would be rounded to 0 before a loss scale enlarges them.
    divide = x.dtype != torch.float16
    (of_rows, lse, _, predicted, entropy), (total, factor, num_tokens) = kernels.forward_backward_reduce(
        Logits(x, targets.target, problem.weight, probs), targets.token_weight, reduction.normalizer, call.options,
        dx=dx, mean=reduction.reduction == "mean", divide=divide, out_dtype=loss_dtype, with_stats=call.with_stats,
    )  # fmt: skip
    return Computed(total, None if divide else factor, of_rows, lse, predicted, entropy, num_tokens)


def _reduced_by_pytorch(problem: LogitsProblem, x: Tensor, dx: Tensor) -> Computed:
    """Writes the gradient into `dx`."""
    _, targets, call, reduction, *_ = problem
    options, logits = call.options, problem.logits
    kernels = choice.implementation(call.backend, x.device)
    if logits.probs is None:
        choice.check_targets(targets.target, options.ignore_index, x.shape[-1])
    factors = scales(targets, reduction, options.z_loss, weight_of_target(targets, logits.weight, logits.probs))
    scale, z_scale, factor = factors.loss, factors.z_loss, None
    if x.dtype == torch.float16 and factors.divisor is not None:
        # Divided in backward: gradients as small as 1 / N would be rounded to 0 before a loss scale enlarges them.
        divisor = torch.as_tensor(factors.divisor, dtype=scale.dtype, device=x.device)
        divisor = torch.where(divisor == 0.0, 1.0, divisor)  # 0 if no row is kept: gradients of 0 then remain 0
        scale, z_scale = scale * divisor, None if z_scale is None else z_scale * divisor
        factor = 1.0 / divisor
    rows = Rows(
        *kernels.forward_backward(
            Upstream(scale), logits._replace(x=x), options, dx=dx, dz=z_scale, with_stats=call.with_stats
        )
    )
    total = scaled_total(rows.loss, rows.lse, factors.loss, factors.z_loss, options.z_loss)
    total = total if factors.nothing is None else total + factors.nothing
    return Computed(total, factor, rows.loss, rows.lse, rows.predicted, rows.entropy, None)
