"""A scalar loss of logits that the backend's own kernel reduces: two launches forward and one backward.

Forward takes a third launch if rows are very many. The general reduction in `core/reduction.py` takes some ten
operations of PyTorch, each of which is a launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..core.batches import is_batched, loops_over_batches
from ..core.rows import Logits, Saved, Upstream, classes_back, classes_last
from .double_backward import differentiable_backward
from .problem import LogitsProblem


def loss(problem: LogitsProblem) -> Any:
    """The loss, or (loss, LossStats); the loss is differentiable in logits and probabilities."""
    found = ReducedByKernel.apply(problem.tensors.input, problem.probs, problem)
    if not problem.call.with_stats:
        return problem.result(found)
    total, num_tokens, *statistics = found
    return problem.result(total, *statistics, num_tokens=num_tokens)


class ReducedByKernel(torch.autograd.Function):
    """Returns the loss, or with statistics (loss, number of kept rows, losses of rows, lse, predicted, entropy)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, probs: Tensor | None, problem: LogitsProblem) -> Any:
        _, targets, call, reduction, loss_dtype, classes_dim, inplace, _ = problem
        options, with_stats, backend, _ = call
        target, weight = targets.target, problem.weight
        kernels: Any = choice.implementation(backend, input.device)
        if probs is None:
            choice.check_targets(target, options.ignore_index, input.shape[classes_dim])
        rows, (loss, factor, num_tokens) = kernels.forward_reduce(
            Logits(as_rows(input, classes_dim), target, weight, as_rows(probs, classes_dim)), targets.token_weight,
            reduction.normalizer, options, mean=reduction.reduction == "mean", out_dtype=loss_dtype,
            with_stats=with_stats,
        )  # fmt: skip
        of_rows, lse, norm, predicted, entropy = rows
        ctx.save_for_backward(input, probs, target, weight, norm, factor, targets.token_weight)
        ctx.call = kernels, options, classes_dim, inplace
        if not with_stats:
            return loss
        ctx.mark_non_differentiable(num_tokens, of_rows, lse, predicted, entropy)
        ctx.set_materialize_grads(False)
        return loss, num_tokens, of_rows, lse, predicted, entropy

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, dtotal: Any, *_: Any) -> tuple[Tensor | None, ...]:
        if dtotal is None:
            return None, None, None
        need_dx, need_dprobs, *_ = ctx.needs_input_grad
        kernels, options, classes_dim, inplace = ctx.call
        inplace = inplace and not is_batched(ctx)
        input, probs, target, weight, norm, factor, token_weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            dloss = dtotal * factor if token_weight is None else dtotal * factor * token_weight
            upstream = Upstream(dloss.to(norm.dtype).expand(len(target)))
            q = None if probs is None else classes_last(probs, classes_dim)
            logits = Logits(classes_last(input, classes_dim), target, weight, q)
            dx, dprobs = differentiable_backward(upstream, logits, options, need_dx, need_dprobs)
            dx = None if dx is None else classes_back(dx, input.shape, classes_dim)
            return dx, None if dprobs is None else classes_back(dprobs, input.shape, classes_dim), None
        x, q = as_rows(input, classes_dim), as_rows(probs, classes_dim)
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
        return _as_given(dx, input.shape, classes_dim), _as_given(dprobs, input.shape, classes_dim), None


def as_rows(t: Tensor | None, classes_dim: int) -> Any:
    """Logits as the kernels take them: (C) and (N, C) as they are, others as (B, T, C)."""
    return t if t is None or t.dim() <= 2 else classes_last(t, classes_dim)


def _as_given(gradient: Tensor | None, shape: torch.Size, classes_dim: int) -> Tensor | None:
    return gradient if gradient is None or len(shape) <= 2 else classes_back(gradient, shape, classes_dim)
