"""A scalar loss of logits that the backend's own kernel reduces: two launches forward and one backward.

Forward takes a third launch if rows are very many. The general reduction in `reduction.py` takes some ten operations
of PyTorch, each of which is a launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choice as backends
from ..core.operators import is_plain
from ..core.rows import Logits, Saved, Upstream, classes_back, classes_last
from .grad_in_forward import GradInForward
from .problem import LogitsProblem
from .row_results import differentiable_backward


class _ReducedByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, probs: Tensor | None, problem: LogitsProblem, inplace: bool) -> Any:
        _, targets, call, reduction, loss_dtype, classes_dim = problem
        options, with_stats, backend, _ = call
        target, weight = targets.target, problem.weight
        kernels: Any = backends.implementation(backend, input.device)
        if probs is None:
            backends.check_targets(target, options.ignore_index, input.shape[classes_dim])
        rows, (loss, factor, num_tokens) = kernels.forward_reduce(
            Logits(_rows(input, classes_dim), target, weight, _rows(probs, classes_dim)), targets.token_weight,
            reduction.normalizer, options, mean=reduction.reduction == "mean", out_dtype=loss_dtype,
            with_stats=with_stats,
        )  # fmt: skip
        _, lse, norm, predicted, entropy = rows
        ctx.save_for_backward(input, probs, target, weight, norm, factor, targets.token_weight)
        ctx.call = kernels, options, classes_dim, inplace
        if not with_stats:
            return loss
        ctx.mark_non_differentiable(num_tokens, lse, predicted, entropy)
        ctx.set_materialize_grads(False)
        return loss, num_tokens, lse, predicted, entropy

    @staticmethod
    def backward(ctx: Any, dtotal: Any, *_: Any) -> tuple[Tensor | None, ...]:
        if dtotal is None:
            return None, None, None, None
        need_dx, need_dprobs, *_ = ctx.needs_input_grad
        kernels, options, classes_dim, inplace = ctx.call
        input, probs, target, weight, norm, factor, token_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            dloss = dtotal * factor if token_weight is None else dtotal * factor * token_weight
            upstream = Upstream(dloss.to(norm.dtype).expand(len(target)))
            q = None if probs is None else classes_last(probs, classes_dim)
            logits = Logits(classes_last(input, classes_dim), target, weight, q)
            dx, dprobs = differentiable_backward(upstream, logits, options, need_dx, need_dprobs)
            dx = None if dx is None else classes_back(dx, input.shape, classes_dim)
            return dx, None if dprobs is None else classes_back(dprobs, input.shape, classes_dim), None, None
        x, q = _rows(input, classes_dim), _rows(probs, classes_dim)
        dx = dprobs = None
        if need_dx:
            dx = x.detach() if inplace else torch.empty_like(x)
        if need_dprobs:
            dprobs = torch.empty_like(q)
        kernels.backward(
            Upstream(dtotal, None, None, factor, token_weight), Logits(x, target, weight, q), Saved(norm, None),
            options, dx=dx, dprobs=dprobs,
        )  # fmt: skip
        if need_dx and inplace:
            torch.autograd.graph.increment_version(input)
        return _as_given(dx, input.shape, classes_dim), _as_given(dprobs, input.shape, classes_dim), None, None


def _rows(t: Tensor | None, classes_dim: int) -> Any:
    """Logits as the kernels take them: (C) and (N, C) as they are, others as (B, T, C)."""
    return t if t is None or t.dim() <= 2 else classes_last(t, classes_dim)


def _as_given(gradient: Tensor | None, shape: torch.Size, classes_dim: int) -> Tensor | None:
    return gradient if gradient is None or len(shape) <= 2 else classes_back(gradient, shape, classes_dim)


def can_reduce(problem: LogitsProblem) -> bool:
    """Whether the kernel reduces a loss: a scalar without z-loss, differentiable in logits and probabilities only."""
    call, reduction = problem.call, problem.reduction
    return (
        call.backend == "triton"
        and call.group is None
        and reduction.reduction != "none"
        and reduction.return_stats != "differentiable"
        and call.options.z_loss == 0.0
        and is_plain(problem.tensors.input)
        and not _differentiable(problem.targets.token_weight)
        and not _differentiable(reduction.normalizer)
    )


def _differentiable(factor: Any) -> bool:
    return isinstance(factor, Tensor) and factor.requires_grad


def reduced_by_kernel(problem: LogitsProblem, inplace_backward: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss, (number of kept rows, lse, predicted, entropy)); without statistics, the inner tuple is empty.

    The loss is differentiable in logits and probabilities.
    """
    found = _ReducedByKernel.apply(problem.tensors.input, problem.probs, problem, inplace_backward)
    return (found[0], found[1:]) if problem.call.with_stats else (found, ())


def reduced_with_gradient(problem: LogitsProblem, inplace: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `reduced_by_kernel`, with the gradient in the logits computed along with the loss."""
    (input, _, _, _), targets, call, reduction, loss_dtype, classes_dim = problem
    options, with_stats, backend, _ = call
    x, q = _rows(input, classes_dim), _rows(problem.probs, classes_dim)
    kernels: Any = backends.implementation(backend, x.device)
    if q is None:
        backends.check_targets(targets.target, options.ignore_index, x.shape[-1])
    # Divided in backward: gradients as small as 1 / N would be rounded to 0 before a loss scale enlarges them.
    divide = x.dtype != torch.float16

    def compute(dx: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        (_, lse, _, predicted, entropy), (loss, factor, num_tokens) = kernels.forward_backward_reduce(
            Logits(x, targets.target, problem.weight, q), targets.token_weight, reduction.normalizer, options, dx=dx,
            mean=reduction.reduction == "mean", divide=divide, out_dtype=loss_dtype, with_stats=with_stats,
        )  # fmt: skip
        return loss, None if divide else factor, (num_tokens, lse, predicted, entropy) if with_stats else ()

    loss, *statistics = GradInForward.apply(x, compute, inplace, backend)
    return loss, tuple(statistics)
