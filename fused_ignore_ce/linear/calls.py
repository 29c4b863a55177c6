"""A call of the linear loss below the public functions: its options, its plan, and the agreement of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import choice
from ..core.eager import is_tracing
from ..core.options import LossOptions, schema_of
from ..core.rows import Block
from ..distributed import ranks
from ..distributed.ranks import Shard
from .gradients import Wanted
from .plan import LinearPlan, Sizes, choose
from .tiles import Operands, Tiles


class LinearCall(NamedTuple):
    """The settings that all rows of a call share."""

    options: LossOptions
    with_stats: bool
    backend: str
    group: str | None  # the name of the process group that the vocabulary is sharded over
    dtype: torch.dtype  # of the matrix products
    memory_budget: int | None
    logits_dtype: torch.dtype | None  # None: that of the matrix products
    gathered: bool  # whether some rows are ignored, so that the kept ones are a copy


OPERANDS_SCHEMA = "Tensor h, Tensor w, Tensor? b, Tensor target, Tensor? weight, Tensor? probs"
CALL_SCHEMA = schema_of(LinearCall)
OPERANDS = len(Operands._fields)
NOTHING = Wanted(False, False, False)


def plan_of(operands: Operands, call: LinearCall, wanted: Wanted, *, recompute: bool) -> LinearPlan:
    """The plan for these sizes: the same whenever it is asked for."""
    h, w, probs = operands.h, operands.w, operands.probs
    sizes = Sizes(
        N=h.shape[0],
        V=w.shape[0],
        D=h.shape[1],
        dtype=call.dtype,
        input_dtype=h.dtype,
        weight_dtype=w.dtype,
        device=h.device.type,
        dinput=wanted.h,
        dweight=wanted.w,
        gathered=call.gathered,
        recompute=recompute,
        probs=probs is not None,
        wide=call.logits_dtype not in (None, call.dtype),
        ranks=1 if call.group is None else ranks.group_named(call.group).size(),
    )
    return choose(sizes, call.memory_budget)


def agreed_shard(operands: Operands, call: LinearCall) -> Shard | None:
    """The shard that this rank has, once all ranks agree; without a group, checks the targets and returns None."""
    h, w, _, target, weight, probs = operands
    options = call.options
    if call.group is None:
        if probs is None:
            choice.check_targets(target, options.ignore_index, w.shape[0])
        return None
    same = (h.dtype, h.shape[1], probs is None, tuple(options), call.with_stats, weight is None)
    index = target if probs is None else None
    return ranks.agree(call.group, w.shape[0], index, options.ignore_index, len(target), same)


def tiles_of(operands: Operands, call: LinearCall, wanted: Wanted = NOTHING) -> Tiles:
    """The tiles of a forward that computes the gradients that are wanted along with the losses."""
    return _tiles(operands, call, agreed_shard(operands, call), plan_of(operands, call, wanted, recompute=False))


def tiles_of_backward(operands: Operands, call: LinearCall, wanted: Wanted, block: Block | None) -> Tiles:
    """The tiles of a backward that computes the logits again; `block` is what forward's ranks agreed on, if any."""
    shard = None if call.group is None or block is None else Shard(ranks.group_named(call.group), block)
    return _tiles(operands, call, shard, plan_of(operands, call, wanted, recompute=True))


def _tiles(operands: Operands, call: LinearCall, shard: Shard | None, plan: LinearPlan) -> Tiles:
    return Tiles(
        operands,
        call.options,
        plan,
        dtype=call.dtype,
        logits_dtype=call.logits_dtype,
        backend=call.backend,
        with_stats=call.with_stats,
        shard=shard,
    )


def refuse_create_graph() -> None:
    if torch.is_grad_enabled() and not is_tracing():
        raise RuntimeError(
            "create_graph: expected False, as losses from hidden states have no second derivative, got True; where "
            "you need one, call fused_cross_entropy(F.linear(input, linear_weight, linear_bias), target)"
        )
