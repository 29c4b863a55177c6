"""Distillation from the hidden states of both sides: the logits of a chunk of tokens at a time, and their gradient.

For every chunk, a matrix product gives the student's logits and another one the teacher's. The gradient takes the place
of the student's logits, and two more products give those of the student's operands. Where the reduction is a scalar,
this happens in forward, and backward scales. Otherwise backward computes the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.blocks import BLOCK_ELEMENTS
from ..backends.choice import distiller, scaled
from ..backends.divergences import DistilledRows, Teacher
from ..core.batches import is_batched, loops_over_batches
from ..core.distillation import DistillationOptions, refuse_create_graph
from ..core.eager import PACKAGE, is_plain
from ..core.options import flatten, schema_of, unflatten
from ..core.rows import acc_dtype
from .gradients import GradientSums, Wanted
from .plan import ONE_BLOCK, TOKEN_CHUNKS, LinearPlan, accumulates, product_elements, too_little
from .tiles import Operands, Tiles

#: Bytes of a chunk's logits of both sides, unless `memory_budget` is given, and the fewest rows of a chunk: with fewer,
#: a matrix product takes longer to read the head than to multiply.
CHUNK_BYTES, CHUNK_ROWS = 1 << 29, 256

#: Bytes of what `backends/top_k.py` holds for each of a teacher's likeliest classes: a dozen numbers in float64.
TOP_K_BYTES = 96


class Side(NamedTuple):
    """Hidden states (N, D) and the head that they are multiplied with, (V, D) and (V,).

    Or, of a teacher with the option `tail`, log-probabilities (N, K) and the classes (N, K) that have them.
    """

    h: Tensor
    w: Tensor
    b: Tensor | None

    def of(self, rows: Tensor, both: bool = False) -> Side:
        """These rows of it; `both`: the second tensor has rows, too."""
        return Side(self.h.index_select(0, rows), self.w.index_select(0, rows) if both else self.w, self.b)


class Settings(NamedTuple):
    """What is neither a tensor nor an option of the loss."""

    with_stats: bool
    dtype: torch.dtype  # of the student's matrix products
    teacher_dtype: torch.dtype
    logits_dtype: torch.dtype | None  # of both sides; None: that of the matrix products
    memory_budget: int | None
    backend: str


class Distilled(NamedTuple):
    """The results of all rows, and the gradients of the student's operands, which are empty where not wanted."""

    loss: Tensor
    lse: Tensor
    predicted: Tensor
    entropy: Tensor
    dh: Tensor
    dw: Tensor
    db: Tensor


def plan(student: Side, teacher: Side, settings: Settings, wanted: Wanted, tail: str) -> LinearPlan:
    """How many tokens have logits at a time. A budget that is too small is an error."""
    (N, D), V = student.h.shape, len(student.w)
    size, acc = settings.dtype.itemsize, acc_dtype(settings.dtype).itemsize
    wide = settings.logits_dtype or settings.dtype
    a_row = V * (wide.itemsize + size * (wide != settings.dtype))  # the gradient is cast for the products
    a_row += TOP_K_BYTES * teacher.h.shape[1] if tail and settings.backend == "triton" else 0
    a_row += 0 if tail else V * (settings.logits_dtype or settings.teacher_dtype).itemsize
    whole = product_elements(N * V, D) * (size + acc)
    whole += 8 * acc * min(N * V, max(BLOCK_ELEMENTS, V)) * (settings.backend == "torch")
    whole += N * D * (student.h.dtype != settings.dtype) * size + V * D * (student.w.dtype != settings.dtype) * size
    if not tail and teacher.w.dtype != settings.teacher_dtype:
        whole += teacher.w.numel() * settings.teacher_dtype.itemsize
    sums = V * D * acc * (wanted.w and accumulates(student.w.dtype, settings.dtype, True))
    if settings.memory_budget is None:
        rows = max(CHUNK_ROWS, CHUNK_BYTES // max(a_row, 1))
    elif whole + N * a_row <= settings.memory_budget:
        rows = N
    else:
        rows = (settings.memory_budget - whole - sums) // max(a_row, 1)
        if rows < 1:
            least = whole + min(N * a_row, sums + a_row)
            raise too_little(least, N, V, D, settings.dtype, settings.memory_budget)
    rows = max(1, min(rows, N))
    several = rows < N
    return LinearPlan(TOKEN_CHUNKS if several else ONE_BLOCK, rows, whole + sums * several + rows * a_row)


def check_budget(student: Side, teacher: Side, settings: Settings, tail: str) -> None:
    """Raises an error if the budget is too small for the loss and those gradients that the student's operands want."""
    wanted = Wanted(*(t is not None and t.requires_grad and torch.is_grad_enabled() for t in student))
    plan(student, teacher, settings, wanted, tail)


def _compute(
    student: Side,
    teacher: Side,
    target: Tensor,
    scale: Tensor | None,
    wanted: Wanted,
    settings: Settings,
    options: DistillationOptions,
) -> Distilled:
    chosen = plan(student, teacher, settings, wanted, options.tail)

    def tiles(side: Side, dtype: torch.dtype) -> Tiles:
        operands = Operands(*side, target, None, None)
        return Tiles(
            operands, options.options, chosen, dtype=dtype, logits_dtype=settings.logits_dtype,
            backend=settings.backend, with_stats=False, shard=None,
        )  # fmt: skip

    found = DistilledRows.zeros(student.h, len(target), settings.with_stats)
    with torch.autocast(student.h.device.type, enabled=False):
        mine = tiles(student, settings.dtype)
        theirs = None if options.tail else tiles(teacher, settings.teacher_dtype)
        sums = GradientSums(mine, wanted)
        kernels = distiller(settings.backend, student.h.device, options.tail)
        (block,) = mine.blocks
        for rows in mine.chunks:
            x = mine.logits(rows, block)
            known = Teacher(teacher.h, teacher.w).at(rows) if theirs is None else Teacher(theirs.logits(rows, block))
            given = x, known, target[rows], options
            if any(wanted):
                assert scale is not None
                part = kernels.forward_backward(scale[rows], *given, dx=x, with_stats=settings.with_stats)
            else:
                part, _ = kernels.forward(*given, with_stats=settings.with_stats)
            for whole, values in zip(found, part, strict=True):
                if len(whole):
                    whole[rows] = values
            if any(wanted):
                sums.add_products(rows, block, x)
        gradients = sums.gradients()
    return Distilled(*found, *(found.loss.new_empty(0) if g is None else g for g in gradients[:3]))


_SIDES = "Tensor h, Tensor w, Tensor? b, Tensor teacher_h, Tensor teacher_w, Tensor? teacher_b"
_SETTINGS = "bool with_stats, ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype"
_SETTINGS += ", int? memory_budget, str backend"


def _flat(*args: Any) -> tuple[Tensor, ...]:
    """`_compute` with the arguments of the operator."""
    wanted, settings = Wanted(*args[8:11]), Settings(*args[11:17])
    options = unflatten(DistillationOptions, args[17:])
    target, scale = args[6:8]
    return tuple(_compute(Side(*args[:3]), Side(*args[3:6]), target, scale, wanted, settings, options))


_operator = torch.library.custom_op(
    f"{PACKAGE}::linear_distillation",
    _flat,
    mutates_args=(),
    schema=f"({_SIDES}, Tensor target, Tensor? scale, bool need_dh, bool need_dw, bool need_db, {_SETTINGS}, "
    f"{schema_of(DistillationOptions)}) -> (" + ", ".join(["Tensor"] * len(Distilled._fields)) + ")",
)


@_operator.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    rows = DistilledRows.zeros(args[0], args[6].shape[0], args[11])
    gradients = [
        rows.loss.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(args[:3], args[8:11], strict=True)
    ]
    return (*rows, *gradients)


def _run(*args: Any) -> Sequence[Tensor]:
    return _flat(*args) if is_plain(args[0]) else _operator(*args)


class _Function(torch.autograd.Function):
    """The scaled sum of the rows' losses, if `at_once`, or else the losses of the rows; and the rows' statistics."""

    @staticmethod
    def forward(ctx: Any, at_once: bool, scalars: tuple[Any, ...], *tensors: Any) -> Any:
        scale = tensors[7]
        wanted = [need and at_once for need in ctx.needs_input_grad[2:5]]
        loss, lse, predicted, entropy, *of_one = _run(*tensors, *wanted, *scalars)
        value = (loss * scale).sum() if at_once else loss.clone()
        ctx.at_once, ctx.scalars = at_once, scalars
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(loss, lse, predicted, entropy)
        ctx.save_for_backward(*((loss, *of_one) if at_once else tensors[:7]))
        return value, loss, lse, predicted, entropy

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, upstream: Any, *_: Any) -> Any:
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needs)
        if upstream is None:
            return tuple(found)
        refuse_create_graph()
        if ctx.at_once:
            loss, *of_one = ctx.saved_tensors
            backend = Settings(*ctx.scalars[: len(Settings._fields)]).backend
            for i, gradient in enumerate(of_one, 2):
                found[i] = scaled(gradient, upstream, backend, keep=is_batched(ctx)) if needs[i] else None
            if needs[9]:
                found[9] = loss * upstream
        else:
            wanted = [bool(need) for need in needs[2:5]]
            results = _run(*ctx.saved_tensors, upstream, *wanted, False, *ctx.scalars[1:])
            for i, gradient in enumerate(results[4:], 2):
                found[i] = gradient if needs[i] else None
        return tuple(found)


def distilled(
    at_once: bool,
    student: Side,
    teacher: Side,
    target: Tensor,
    scale: Tensor | None,
    settings: Settings,
    options: DistillationOptions,
) -> tuple[Tensor, DistilledRows]:
    """The sum of `loss * scale` (0-d) if `at_once`, else the losses (N,), which is differentiable; and the rows.

    Rows that are ignored have hidden states of 0, or are left out.
    """
    if settings.memory_budget is not None and is_plain(student.h):
        check_budget(student, teacher, settings, options.tail)  # now, and not in backward
    value, *rows = _Function.apply(at_once, (*settings, *flatten(options)), *student, *teacher, target, scale)
    return value, DistilledRows(*rows)
