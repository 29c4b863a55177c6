"""A scalar loss of logits that the backend's own kernel reduces: two launches forward and one backward.

The general reduction in `reduction.py` is some ten operations of PyTorch, each of them a launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .autograd import RowCall, differentiable_backward
from .operators import is_plain
from .options import ReductionOptions
from .reduction import Targets
from .rows import Logits, Rows, Saved, Upstream


class _ReducedByKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probs: Tensor | None,
        logits: Logits,
        targets: Targets,
        call: RowCall,
        reducing: tuple[ReductionOptions, torch.dtype, bool],
    ) -> Tensor | tuple[Tensor, ...]:
        reduction, loss_dtype, ctx.inplace = reducing
        kernels: Any = backends.implementation(call.backend, x.device)
        if probs is None:
            backends.check_targets(logits.target, call.options.ignore_index, x.shape[-1])
        found, (total, num_tokens, factor) = kernels.forward_reduce(
            *logits, targets.token_weight, reduction.normalizer, call.options, mean=reduction.reduction == "mean",
            out_dtype=loss_dtype, with_stats=call.with_stats,
        )  # fmt: skip
        loss: Tensor = total
        rows = Rows(*found)
        ctx.save_for_backward(*logits, rows.shift, rows.mass, factor, targets.token_weight)
        ctx.call = call
        if not call.with_stats:
            return loss
        statistics = (num_tokens, rows.lse, rows.predicted, rows.entropy)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, dtotal: Any, *_: Any) -> tuple[Tensor | None, ...]:
        need_dx, need_dprobs, *_ = ctx.needs_input_grad
        if dtotal is None:
            return (None,) * 6
        x, target, weight, probs, shift, mass, factor, token_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            dloss = dtotal * factor if token_weight is None else dtotal * factor * token_weight
            upstream = Upstream(dloss.to(shift.dtype).expand(len(target)))
            logits = Logits(x, target, weight, probs)
            found = differentiable_backward(upstream, logits, ctx.call.options, need_dx, need_dprobs)
            return *found, None, None, None, None
        overwrites = need_dx and ctx.inplace
        dx = (x.detach() if overwrites else torch.empty_like(x)) if need_dx else None
        dprobs = torch.empty_like(probs) if need_dprobs else None
        backends.implementation(ctx.call.backend, x.device).backward(
            Upstream(dtotal, factor=factor, token_weight=token_weight), x, target, weight, probs,
            Saved(shift, mass, mass), ctx.call.options, dx=dx, dprobs=dprobs, block=None,
        )  # fmt: skip
        if overwrites:
            torch.autograd.graph.increment_version(x)
        return dx, dprobs, None, None, None, None


def can_reduce(logits: Logits, targets: Targets, reduction: ReductionOptions, call: RowCall) -> bool:
    """Whether the kernel's reduction is the one that is wanted: a plain scalar, differentiable in the logits alone."""
    weights = (targets.token_weight, reduction.normalizer)
    return (
        call.backend == "triton"
        and call.group is None
        and reduction.reduction != "none"
        and reduction.return_stats != "differentiable"
        and call.options.z_loss == 0.0
        and is_plain(logits.x)
        and not any(isinstance(t, Tensor) and t.requires_grad for t in weights)
    )


def reduced_by_kernel(
    logits: Logits,
    targets: Targets,
    reduction: ReductionOptions,
    call: RowCall,
    loss_dtype: torch.dtype,
    inplace_backward: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss, (number of kept rows, lse, predicted, entropy)); the latter are there if the call is with statistics.

    The loss is differentiable in logits and probabilities.
    """
    reducing = (reduction, loss_dtype, inplace_backward)
    found = _ReducedByKernel.apply(logits.x, logits.probs, logits, targets, call, reducing)
    return (found[0], found[1:]) if call.with_stats else (found, ())
