"""The results of rows of logits, with their gradients: an autograd.Function in eager mode, operators in tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..core.batches import is_batched, loops_over_batches
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, schema_of, unflatten
from ..core.rows import (
    RESULTS_SCHEMA,
    Logits,
    RowResults,
    Rows,
    Saved,
    Upstream,
    block_of,
    classes_back,
    classes_last,
    fake_results,
)
from ..distributed import ranks
from .double_backward import differentiable_backward
from .problem import LogitsProblem, RowCall


def _forward(logits: Logits, call: RowCall) -> RowResults:
    kernels = choice.implementation(call.backend, logits.x.device)
    if call.group is not None:
        merged, shard = ranks.forward(kernels, call.group, logits, call.options, call.with_stats)
        return RowResults.of_group(*merged, torch.tensor(shard.block))
    if logits.probs is None:
        choice.check_targets(logits.target, call.options.ignore_index, logits.x.shape[-1])
    return RowResults.of(Rows(*kernels.forward(logits, call.options, with_stats=call.with_stats)))


def _backward(
    upstream: Upstream,
    logits: Logits,
    saved: Saved,
    place: Tensor,
    call: RowCall,
    gradients: tuple[Tensor | None, Tensor | None],
) -> None:
    """Writes the `gradients` (dx, dprobs) that are not None; `place` is `RowResults.block`."""
    dx, dprobs = gradients
    kernels = choice.implementation(call.backend, logits.x.device)
    kernels.backward(upstream, logits, saved, call.options, dx=dx, dprobs=dprobs, block=block_of(place))


# The operators take logits and probabilities as the caller gave them, with the dimension of classes: Inductor does not
# notice a write to a tensor of which a view is saved for backward.
_LOGITS_SCHEMA = "Tensor input, Tensor target, Tensor? weight, Tensor? probs, int classes_dim"
_OPERANDS = 5
_CALL_SCHEMA = schema_of(RowCall)


@torch.library.custom_op(
    f"{PACKAGE}::cross_entropy_forward",
    mutates_args=(),
    schema=f"({_LOGITS_SCHEMA}, {_CALL_SCHEMA}) -> {RESULTS_SCHEMA}",
)
def _forward_operator(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_forward(_logits(*args[:_OPERANDS]), unflatten(RowCall, args[_OPERANDS:])))


@_forward_operator.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    x, _, weight, probs = _logits(*args[:_OPERANDS])
    return tuple(fake_results(x, x.shape[0] * x.shape[1], unflatten(RowCall, args[_OPERANDS:]), weight, probs))


def _logits(input: Tensor, target: Tensor, weight: Tensor | None, probs: Tensor | None, classes_dim: int) -> Logits:
    q = None if probs is None else classes_last(probs, classes_dim)
    return Logits(classes_last(input, classes_dim), target, weight, q)


@torch.library.custom_op(
    f"{PACKAGE}::cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor? dloss, Tensor? dlse, Tensor? dentropy, {_LOGITS_SCHEMA}, Tensor norm, "
    f"Tensor entropy, Tensor block, bool need_dx, bool need_dprobs, {_CALL_SCHEMA}) -> (Tensor, Tensor)",
)
def _backward_operator(*args: Any) -> tuple[Tensor, Tensor]:
    """(d input, dprobs); one that is not needed is empty."""
    upstream, given, saved, place = Upstream(*args[:3]), args[3:8], Saved(*args[8:10]), args[10]
    need_dx, need_dprobs, *call = args[11:]
    logits = _logits(*given)
    gradients = _gradients_like(logits, need_dx, need_dprobs)
    _backward(upstream, logits, saved, place, unflatten(RowCall, tuple(call)), gradients)
    return _as_given(gradients, given)


@_backward_operator.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    given, (need_dx, need_dprobs, *_) = args[3:8], args[11:]
    return _as_given(_gradients_like(_logits(*given), need_dx, need_dprobs), given)


def _as_given(gradients: tuple[Tensor | None, Tensor | None], given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    input, *_, classes_dim = given
    found = [input.new_empty(0) if t is None else classes_back(t, input.shape, classes_dim) for t in gradients]
    return found[0], found[1]


def _gradients_like(logits: Logits, need_dx: bool, need_dprobs: bool) -> tuple[Tensor | None, Tensor | None]:
    dprobs = torch.empty_like(logits.probs) if need_dprobs and logits.probs is not None else None
    return torch.empty_like(logits.x) if need_dx else None, dprobs


def _save(ctx: Any, logits: tuple[Any, ...], results: RowResults, with_stats: bool) -> None:
    ctx.save_for_backward(*logits, results.norm, results.entropy, results.block)
    ctx.mark_non_differentiable(*results.constants(with_stats))
    ctx.set_materialize_grads(False)


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.classes_dim, ctx.call = inputs[_OPERANDS - 1], inputs[_OPERANDS:]
    _save(ctx, inputs[: _OPERANDS - 1], RowResults(*output), unflatten(RowCall, ctx.call).with_stats)


def _operator_backward(ctx: Any, dloss: Any, dlse: Any, dentropy: Any, *_: Any) -> tuple[Tensor | None, ...]:
    dx = dprobs = None
    if any(gradient is not None for gradient in (dloss, dlse, dentropy)):
        need_dx, _, _, need_dprobs, *_ = ctx.needs_input_grad
        tensors = ctx.saved_tensors
        given = (*tensors[:4], ctx.classes_dim, *tensors[4:])
        if torch.is_grad_enabled():  # create_graph=True
            _refuse_create_graph(tensors[6])
            upstream, call = Upstream(dloss, dlse, dentropy), unflatten(RowCall, ctx.call)
            found = differentiable_backward(upstream, _logits(*given[:5]), call.options, need_dx, need_dprobs)
            gradients = _as_given(found, given[:5])
        else:
            gradients = _backward_operator(dloss, dlse, dentropy, *given, need_dx, need_dprobs, *ctx.call)
        dx, dprobs = gradients[0] if need_dx else None, gradients[1] if need_dprobs else None
    return dx, None, None, dprobs, None, *[None] * len(ctx.call)


_forward_operator.register_autograd(_operator_backward, setup_context=_save_operator)


class CrossEntropyRows(torch.autograd.Function):
    """The operator's forward and backward for plain tensors in eager mode; the gradient may overwrite x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        probs: Tensor | None,
        call: RowCall,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        logits = Logits(x, target, weight, probs)
        results = _forward(logits, call)
        _save(ctx, logits, results, call.with_stats)
        ctx.call, ctx.inplace_backward = call, inplace_backward
        return tuple(results)

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, dloss: Any, dlse: Any, dentropy: Any, *_: Any) -> tuple[Tensor | None, ...]:
        dx = dprobs = None
        if any(gradient is not None for gradient in (dloss, dlse, dentropy)):
            need_dx, _, _, need_dprobs, *_ = ctx.needs_input_grad
            # Accessed only once: activation checkpointing recomputes saved tensors for the first access only.
            tensors = ctx.saved_tensors
            logits, saved, place = Logits(*tensors[:4]), Saved(*tensors[4:6]), tensors[6]
            upstream = Upstream(dloss, dlse, dentropy)
            if torch.is_grad_enabled():  # create_graph=True
                _refuse_create_graph(place)
                dx, dprobs = differentiable_backward(upstream, logits, ctx.call.options, need_dx, need_dprobs)
            else:
                overwrites = need_dx and ctx.inplace_backward and not is_batched(ctx)
                dx, dprobs = _gradients_like(logits, need_dx and not overwrites, need_dprobs)
                dx = logits.x.detach() if overwrites else dx
                _backward(upstream, logits, saved, place, ctx.call, (dx, dprobs))
                if overwrites:
                    torch.autograd.graph.increment_version(logits.x)
        return dx, None, None, dprobs, None, None


def _refuse_create_graph(place: Tensor) -> None:
    if len(place):
        raise NotImplementedError(
            "create_graph: expected False with a sharded vocabulary, got True; gather the logits first, and pass "
            "process_group=None"
        )


def rows_call(problem: LogitsProblem) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function that gives the fields of `RowResults`, and its arguments.

    Loss, lse and entropy are differentiable in logits, the loss also in probabilities.
    """
    tensors, call = problem.tensors, problem.call
    if is_plain(tensors.input):
        return CrossEntropyRows.apply, (*problem.logits, call, problem.inplace_backward)
    given = (tensors.input, problem.targets.target, problem.weight, problem.probs, problem.classes_dim)
    return _forward_operator, (*given, *flatten(call))
