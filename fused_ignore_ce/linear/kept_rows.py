"""Drops the ignored rows of hidden states before the first matrix product, or zeros them where none may be dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.eager import may_wait
from ..core.reduction import Scales, Targets
from ..core.tensors import LinearTensors, holds_probabilities
from ..distributed.ranks import Replicated
from .calls import LinearCall
from .gradients import Wanted
from .sweep import Scale
from .tiles import Operands


class Position(NamedTuple):
    """The kept rows of one of the d1 * ... * dK sets of logits that a batch of hidden states has."""

    operands: Operands
    scale: Scale | None  # None for reduction="none"
    rows: Tensor | None  # which of all rows are kept; None where `operands` has all of them
    call: LinearCall

    @property
    def wanted(self) -> Wanted:
        wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in self.operands]
        h, w, b, _, _, probs = wants
        return Wanted(h, w, b, probs)


def positions_of(tensors: LinearTensors, targets: Targets, scales: Scales | None, call: LinearCall) -> list[Position]:
    """The kept rows of every set of logits."""
    input, linear_weight, target, linear_bias, weight, token_weight, sum_dinput = tensors
    C, *inner, D = linear_weight.shape
    N, P = input.shape[:-1].numel(), torch.Size(inner).numel()
    probs = target.reshape(N, C, P).movedim(1, 2) if holds_probabilities(target) else None
    may_be_ignored = probs is None or token_weight is not None
    h = input.reshape(N, D)
    heads = linear_weight.reshape(C, P, D).unbind(1) if inner else [linear_weight]
    positions = []
    for p, w in enumerate(heads):
        operands = Operands(
            h,
            w,
            None if linear_bias is None else linear_bias.reshape(C, P)[:, p],
            targets.target.view(N, P)[:, p].contiguous(),
            weight,
            None if probs is None else probs[:, p],
        )
        scale = None
        if scales is not None:
            rows_z = None if scales.z_loss is None else scales.z_loss.view(N, P)[:, p]
            scale = Scale(scales.loss.view(N, P)[:, p], rows_z)
        position = _kept(Position(operands, scale, None, call), may_be_ignored)
        if call.group is not None and sum_dinput:  # after the selection: only gradients of kept rows are summed
            h_kept = Replicated.apply(position.operands.h, call.group)
            position = position._replace(operands=position.operands._replace(h=h_kept))
        positions.append(position)
    return positions


def _kept(position: Position, may_be_ignored: bool) -> Position:
    """The kept rows only; or all rows, with zeros for the ignored ones, where the kept ones cannot be selected."""
    operands, scale, _, call = position
    if not may_be_ignored:
        return position
    kept = operands.target != call.options.ignore_index
    if operands.probs is None and may_wait(operands.h):
        rows = kept.nonzero().squeeze(1)
        if len(rows) == len(kept):
            return position
        h, target = operands.h.index_select(0, rows), operands.target.index_select(0, rows)
        if scale is not None:
            rows_z = None if scale.rows_z is None else scale.rows_z.index_select(0, rows)
            scale = Scale(scale.rows.index_select(0, rows), rows_z)
        return Position(operands._replace(h=h, target=target), scale, rows, call._replace(gathered=True))
    # Selected, not multiplied by 0: no NaN of an ignored row reaches a matrix product.
    h = torch.where(kept.unsqueeze(1), operands.h, 0.0)
    return Position(operands._replace(h=h), scale, None, call._replace(gathered=True))
