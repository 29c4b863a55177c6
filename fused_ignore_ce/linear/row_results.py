"""The results of rows from hidden states. Backward computes the logits again: four matrix products.

It is an autograd.Function in eager mode, and operators in tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.batches import loops_over_batches
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, unflatten
from ..core.rows import RESULTS_SCHEMA, RowResults, Saved, Upstream, block_of, fake_results
from .calls import CALL_SCHEMA, OPERANDS, OPERANDS_SCHEMA, LinearCall, refuse_create_graph, tiles_of, tiles_of_backward
from .flops import tell_counters
from .gradients import Gradients, Wanted
from .sweep import gradients, losses
from .tiles import Operands


def _gradients(
    upstream: Upstream, operands: Operands, saved: Saved, place: Tensor, call: LinearCall, wanted: Wanted
) -> Gradients:
    tiles = tiles_of_backward(operands, call, wanted, block_of(place))
    return gradients(tiles, upstream, saved, wanted)


@torch.library.custom_op(
    f"{PACKAGE}::linear_cross_entropy_forward",
    mutates_args=(),
    schema=f"({OPERANDS_SCHEMA}, {CALL_SCHEMA}) -> {RESULTS_SCHEMA}",
)
def _rows_operator(*args: Any) -> tuple[Tensor, ...]:
    return tuple(losses(tiles_of(Operands(*args[:OPERANDS]), unflatten(LinearCall, args[OPERANDS:]))))


@_rows_operator.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    operands, call = Operands(*args[:OPERANDS]), unflatten(LinearCall, args[OPERANDS:])
    return tuple(fake_results(operands.h, operands.h.shape[0], call, operands.weight, operands.probs))


@torch.library.custom_op(
    f"{PACKAGE}::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor? dloss, Tensor? dlse, Tensor? dentropy, {OPERANDS_SCHEMA}, Tensor norm, "
    f"Tensor entropy, Tensor block, bool need_dh, bool need_dw, bool need_db, bool need_dprobs, {CALL_SCHEMA}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _rows_backward_operator(*args: Any) -> tuple[Tensor, ...]:
    """(dh, dw, db, dprobs); one that is not needed is empty."""
    upstream, operands, saved, place = Upstream(*args[:3]), Operands(*args[3:9]), Saved(*args[9:11]), args[11]
    wanted, call = Wanted(*args[12:16]), unflatten(LinearCall, args[16:])
    found = _gradients(upstream, operands, saved, place, call, wanted)
    return tuple(operands.h.new_empty(0) if each is None else each for each in found)


@_rows_backward_operator.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    h, w, b, _, _, probs = args[3:9]
    need_dh, need_dw, need_db, need_dprobs = args[12:16]
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(h, memory_format=contiguous) if need_dh else h.new_empty(0),
        torch.empty_like(w, memory_format=contiguous) if need_dw else h.new_empty(0),
        torch.empty_like(b, memory_format=contiguous) if need_db else h.new_empty(0),
        torch.empty_like(probs) if need_dprobs else h.new_empty(0),
    )


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    results = RowResults(*output)
    saved = (results.norm, results.entropy, results.block)
    ctx.save_for_backward(*inputs[:OPERANDS], *saved)
    ctx.call = inputs[OPERANDS:]
    call = ctx.call[0] if isinstance(ctx.call[0], LinearCall) else unflatten(LinearCall, ctx.call)
    ctx.mark_non_differentiable(*results.constants(call.with_stats))
    ctx.set_materialize_grads(False)


def _wanted_of(ctx: Any) -> Wanted:
    need_dh, need_dw, need_db, _, _, need_dprobs, *_ = ctx.needs_input_grad
    return Wanted(need_dh, need_dw, need_db, need_dprobs)


def _rows_gradients(ctx: Any, found: Any) -> tuple[Tensor | None, ...]:
    dh, dw, db, dprobs = (each if need else None for each, need in zip(found, _wanted_of(ctx), strict=True))
    return dh, dw, db, None, None, dprobs, *[None] * len(ctx.call)


def _rows_operator_backward(ctx: Any, dloss: Any, dlse: Any, dentropy: Any, *_: Any) -> tuple[Tensor | None, ...]:
    if all(gradient is None for gradient in (dloss, dlse, dentropy)):
        return (None,) * len(ctx.needs_input_grad)
    refuse_create_graph()
    found = _rows_backward_operator(dloss, dlse, dentropy, *ctx.saved_tensors, *_wanted_of(ctx), *ctx.call)
    return _rows_gradients(ctx, found)


_rows_operator.register_autograd(_rows_operator_backward, setup_context=_save_rows)


class _LinearRows(torch.autograd.Function):
    """The operator's forward and backward for plain tensors in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = tuple(losses(tiles_of(Operands(*inputs[:OPERANDS]), inputs[OPERANDS])))
        _save_rows(ctx, inputs, output)
        return output

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, dloss: Any, dlse: Any, dentropy: Any, *_: Any) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in (dloss, dlse, dentropy)):
            return (None,) * len(ctx.needs_input_grad)
        refuse_create_graph()
        tensors = ctx.saved_tensors  # accessed only once, see CrossEntropyRows
        operands, saved, place = Operands(*tensors[:OPERANDS]), Saved(*tensors[OPERANDS:-1]), tensors[-1]
        (call,) = ctx.call
        upstream = Upstream(dloss, dlse, dentropy)
        return _rows_gradients(ctx, _gradients(upstream, operands, saved, place, call, _wanted_of(ctx)))


def rows_function(h: Tensor) -> Callable[..., Any]:
    """The function that gives the fields of `RowResults` for (*operands, call); it is differentiable as they are."""
    return _LinearRows.apply if is_plain(h) else _traced


def _traced(*args: Any) -> Any:
    tell_counters()
    return _rows_operator(*args[:OPERANDS], *flatten(args[OPERANDS]))
