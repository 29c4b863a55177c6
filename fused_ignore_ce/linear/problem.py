"""The linear loss, checked: which rows are computed, by which operator, and how they are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choice as backends
from ..core.eager import autocasts, is_plain, refuse_transforms
from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_logits_dtype
from ..core.reduction import (
    Scales,
    Targets,
    finished,
    loss_dtype_of,
    prepare_targets,
    reduce_rows,
    scaled_total,
    scales,
    statistics,
    weight_of_target,
)
from ..core.rows import RowResults, acc_dtype
from ..core.tensors import LinearTensors, check_ignored, check_linear, check_token_weight, holds_probabilities
from .calls import LinearCall, plan_of
from .grad_in_forward import ScaledSum, sum_function
from .kept_rows import Position, positions_of
from .plan import ONE_BLOCK, TOKEN_CHUNKS, operand_dtype
from .row_results import rows_function


class LinearProblem(NamedTuple):
    """All that the loss of hidden states depends on, checked."""

    positions: list[Position]
    targets: Targets  # of all rows and positions; the positions of a row follow one another
    scales: Scales | None  # None for reduction="none"
    divides_by_weights_of_ranks: bool  # by class weights of targets, known once ranks merge rows
    reduction: ReductionOptions
    loss_dtype: torch.dtype
    at_once: bool  # whether gradients are computed in forward

    def loss(self) -> Any:
        """The loss, or (loss, LossStats)."""
        targets, reduction, call = self.targets, self.reduction, self.positions[0].call
        found: Sequence[ScaledSum | RowResults]
        if self.at_once:
            found = sums = []
            for position in self.positions:
                assert position.scale is not None
                compute = sum_function(position.operands.h)
                of_sum = compute(*position.operands, *position.scale, position.wanted, position.call)
                sums.append(ScaledSum(*of_sum))
            loss = self._total([each.total for each in sums])
        else:
            found = rows = []
            for position in self.positions:
                rows.append(RowResults(*rows_function(position.operands.h)(*position.operands, position.call)))
            if self.scales is None or self.divides_by_weights_of_ranks:
                of_ranks = self._joined(rows, "target_weight") if self.divides_by_weights_of_ranks else None
                of_all = (self._joined(rows, "loss"), self._joined(rows, "lse"))
                loss = reduce_rows(*of_all, targets, reduction, call.options.z_loss, of_ranks)
            else:
                # Over kept rows, as in `scaled_sum`, so that ranks with different plans return the same bits.
                loss = self._total(
                    [_total(position, each) for position, each in zip(self.positions, rows, strict=True)]
                )
        loss = finished(loss, targets, reduction, self.loss_dtype)
        if not call.with_stats:
            return loss
        if call.group is not None and self.positions[0].operands.probs is not None:
            targets = targets.with_classes(self._joined(found, "likeliest"))
        of_rows = (self._joined(found, name) for name in ("loss", "lse", "predicted", "entropy"))
        return loss, statistics(targets, reduction, *of_rows)

    def _total(self, totals: list[Tensor]) -> Tensor:
        loss = torch.stack(totals).sum()
        nothing = None if self.scales is None else self.scales.nothing
        return loss if nothing is None else loss + nothing

    def _joined(self, found: Sequence[ScaledSum | RowResults], name: str) -> Tensor:
        """A field of the results for all rows and positions: the values of kept rows, and zeros for the others."""
        spread = [
            self.spread(getattr(each, name), position) for each, position in zip(found, self.positions, strict=True)
        ]
        return torch.stack(spread, -1).flatten()

    def spread(self, values: Tensor, position: Position) -> Tensor:
        """Spreads the values of a position's kept rows over all of its rows, with zeros at the others."""
        N = len(self.targets.target) // len(self.positions)
        return values if position.rows is None else values.new_zeros(N).index_copy(0, position.rows, values)


def _total(position: Position, rows: RowResults) -> Tensor:
    assert position.scale is not None
    return scaled_total(rows.loss, rows.lse, *position.scale, position.call.options.z_loss)


def linear_problem(
    tensors: LinearTensors,
    ids: tuple[int, ...],
    options: LossOptions,
    reduction: ReductionOptions,
    memory_budget: int | str | None,
    logits_dtype: torch.dtype | None,
    backend: str,
    group: str | None,
) -> LinearProblem:
    """Checks the tensors, and selects the rows that are computed."""
    input, linear_weight, target, linear_bias, weight, token_weight, _ = tensors
    sizes = check_linear(input, linear_weight, target, linear_bias, weight)
    check_ignored(ids, target)
    check_token_weight(token_weight, sizes.rows, target.device)
    check_logits_dtype(logits_dtype, input.dtype)
    refuse_transforms(input, linear_weight, linear_bias, target if holds_probabilities(target) else None)
    with_stats = bool(reduction.return_stats)
    targets = prepare_targets(
        target, token_weight, ids, sizes, acc=acc_dtype(input.dtype), with_stats=with_stats, sharded=group is not None
    )
    weight = None if weight is None else weight.contiguous()
    shares = (
        weight_of_target(targets, weight, target if holds_probabilities(target) else None) if group is None else None
    )
    row_scales = None
    if reduction.reduction != "none":
        row_scales = scales(targets, reduction, options.z_loss, shares)
    dtype = input.dtype
    if autocasts(input.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    call = LinearCall(
        options,
        with_stats,
        backends.choose(backend, input.device),
        group,
        operand_dtype(dtype, input.device),
        budget_bytes(memory_budget),
        logits_dtype,
        gathered=False,
    )
    positions = positions_of(tensors._replace(weight=weight), targets, row_scales, call)
    divides_by_weights_of_ranks = (
        group is not None
        and weight is not None
        and not holds_probabilities(target)
        and reduction.reduction == "mean"
        and reduction.normalizer is None
    )
    # Gradients are not computed in forward where they would be scaled only after rounding to float16, nor where
    # statistics have gradients.
    early = (
        row_scales is not None
        and not divides_by_weights_of_ranks
        and dtype != torch.float16
        and reduction.return_stats != "differentiable"
    )
    in_forward = [_in_forward(position, early) for position in positions]
    return LinearProblem(
        positions,
        targets,
        row_scales,
        divides_by_weights_of_ranks,
        reduction,
        loss_dtype_of(reduction.loss_dtype, input, target, weight),
        all(in_forward),
    )


def _in_forward(position: Position, early: bool) -> bool:
    """Whether the plan computes gradients in forward. A memory budget that is too small is an error here."""
    operands, _, _, call = position
    wanted = position.wanted
    early = early and not wanted.probs
    if not any(wanted):
        return early
    if not is_plain(operands.h):  # sizes may be symbolic, and are not looked at
        return early and call.memory_budget is None
    plan = plan_of(operands, call, wanted, recompute=not early)
    return early and (plan.plan == ONE_BLOCK or (call.group is None and (plan.plan == TOKEN_CHUNKS or plan.kept > 0)))
