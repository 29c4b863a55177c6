"""A distillation, checked: which rows are computed, and how they are reduced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.choice import check_targets
from ..backends.divergences import DistilledRows
from ..core.distillation import DistillationOptions, check_target
from ..core.eager import autocasts, is_plain, may_wait
from ..core.options import ReductionOptions
from ..core.reduction import (
    LossStats,
    Targets,
    finished,
    loss_dtype_of,
    prepare_targets,
    row_losses,
    scales,
    statistics,
)
from ..core.rows import acc_dtype
from ..core.tensors import Sizes, check_linear, check_token_weight, wrong_shape
from . import distillation
from .distillation import Settings, Side
from .plan import operand_dtype


def check_student(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> int:
    """The number of classes, if the student's hidden states and head fit."""
    rows = torch.empty(input.shape[:-1], dtype=torch.int64, device=input.device) if isinstance(input, Tensor) else input
    V = check_linear(input, linear_weight, rows, linear_bias, None).classes
    if linear_weight.dim() != 2:
        raise wrong_shape("linear_weight", "(V, D)", linear_weight)
    return V


def constant(h: Tensor, w: Tensor, b: Tensor | None) -> Side:
    return Side(h.detach(), w.detach(), None if b is None else b.detach())


def product_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a matrix product with these hidden states."""
    dtype = input.dtype
    if autocasts(input.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    return operand_dtype(dtype, input.device)


def targets_of(
    input: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    ids: tuple[int, ...],
    classes: int,
    options: DistillationOptions,
) -> Targets:
    """The rows that are kept, and their hard labels."""
    shape = input.shape[:-1]
    check_target(target, shape, input.device, options.alpha)
    check_token_weight(token_weight, shape, input.device)
    if target is None:
        some = 0 if ids[0] != 0 else 1  # any class that is not ignored
        target = torch.full(shape, some, dtype=torch.int64, device=input.device)
        ids = ids[:1]
    sizes = Sizes(shape, classes, torch.Size())
    targets = prepare_targets(
        target, token_weight, ids, sizes, acc=acc_dtype(input.dtype), with_stats=False, sharded=False
    )
    if options.alpha < 1.0 and is_plain(input):
        check_targets(targets.target, targets.ignored, classes)
    return targets


def _zero_ignored(side: Side, kept: Tensor) -> Side:
    return side._replace(h=torch.where(kept.unsqueeze(1), side.h, 0.0))


def loss_of_hidden_states(
    student: Side,
    teacher: Side,
    targets: Targets,
    settings: Settings,
    options: DistillationOptions,
    reduction: ReductionOptions,
    input: Tensor,
) -> Tensor | tuple[Tensor, LossStats]:
    """The loss of the kept rows, which are the only ones in matrix products unless nobody may wait for their number."""
    scale = None if reduction.reduction == "none" else scales(targets, reduction, 0.0, None)
    factor, kept, target = None if scale is None else scale.loss, None, targets.target
    if may_wait(input):
        kept = targets.kept.nonzero().squeeze(1)
        if len(kept) == len(target):
            kept = None
    else:  # these are copies, as Inductor does not notice a write to a tensor of which backward needs a view
        student, teacher = (_zero_ignored(side, targets.kept) for side in (student, teacher))
        teacher = teacher._replace(w=torch.where(targets.kept.unsqueeze(1), teacher.w, 0)) if options.tail else teacher
    if kept is not None:
        student, teacher, target = student.of(kept), teacher.of(kept, bool(options.tail)), target.index_select(0, kept)
        factor = None if factor is None else factor.index_select(0, kept)
    at_once = factor is not None and settings.dtype != torch.float16 and input.dtype != torch.float16
    value, rows = distillation.distilled(at_once, student, teacher, target, factor, settings, options)

    def spread(values: Tensor) -> Tensor:
        if kept is None:
            return values
        return values.new_zeros(len(targets.target)).index_copy(0, kept, values)

    if scale is None:
        value = spread(value)
        loss = row_losses(value, value, targets, 0.0)
    else:
        loss = value if factor is None or at_once else (value * factor).sum()
        loss = loss if scale.nothing is None else loss + scale.nothing
    return result_of(loss, rows, targets, reduction, input, spread)


def result_of(
    loss: Tensor, rows: DistilledRows, targets: Targets, reduction: ReductionOptions, input: Tensor, spread: Any
) -> Tensor | tuple[Tensor, LossStats]:
    """What the caller gets."""
    loss = finished(loss, targets, reduction, loss_dtype_of(reduction.loss_dtype, input, targets.target, None))
    if not reduction.return_stats:
        return loss
    return loss, statistics(targets, reduction, *map(spread, rows))
