"""Reduces rows to a scalar in one small launch: the sum, the number of kept rows, and the divisor of "mean".

The order of additions is fixed, so that the same rows give the same bits. If rows are very many, several programs
store their sums, and a second launch adds these. If rows are so few that forward has split them into parts, the
program first merges the parts.
"""

import triton
import triton.language as tl

from .merge import merge_rows
from .structs import Parts, ProgramSums, Rows, Shares, Totals


@triton.jit
def store_totals(out, normalizer_ptr, number, loss, share, count, ACC: tl.constexpr, REDUCTION: tl.constexpr):
    """Divides the sums and stores the results into `Totals`."""
    divisor = tl.full((), 1.0, ACC)
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr).to(ACC)
    elif REDUCTION.HAS_NUMBER:
        divisor = tl.full((), number, ACC)
    elif REDUCTION.MEAN:
        divisor = tl.where(share == 0.0, float("nan"), share)
    if out.total is not None:
        tl.store(out.total, (loss / divisor).to(out.total.dtype.element_ty))
    tl.store(out.factor, 1.0 / divisor)
    if out.num_tokens is not None:
        tl.store(out.num_tokens, count)


@triton.jit(do_not_specialize=["N", "rows_per_program", "classes", "stride_tw", "ignore_index"])
def reduce_kernel(
    shares: Shares,
    number: tl.float64,  # the normalizer, if it is a number
    rows: Rows,  # of which losses are read; with parts, all are written; None if no total is wanted
    parts: Parts,  # or None
    sums_out: ProgramSums,  # takes the place of `out` if there are several programs; or None
    out: Totals,
    N: tl.int64,
    rows_per_program,
    classes,
    stride_tw,  # of the token weights
    ignore_index: tl.int64,
    cap: tl.float64,  # of the parts' logits
    BLOCK_N: tl.constexpr,
    REDUCTION: tl.constexpr,  # Reduction
):
    ACC: tl.constexpr = out.factor.dtype.element_ty
    pid = tl.program_id(0)
    zero = tl.zeros((BLOCK_N,), ACC)
    loss, share = zero, zero
    count = tl.zeros((BLOCK_N,), tl.int32)
    start = tl.cast(pid, tl.int64) * rows_per_program
    end = tl.minimum(start + rows_per_program, N)
    for first in range(start, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < end
        target = tl.load(shares.target + row, mask=inside, other=ignore_index)
        keep = inside & (target != ignore_index)
        count += keep.to(tl.int32)
        token = tl.where(keep, 1.0, 0.0).to(ACC)
        if shares.token_weight is not None:
            token = tl.load(shares.token_weight + row * stride_tw, mask=keep, other=0.0).to(ACC)
        if out.total is not None:
            if parts is None:
                loss_row = tl.load(rows.loss + row, mask=keep, other=0.0)
            else:
                loss_row, _ = merge_rows(rows, parts, row, N, inside, keep, cap, BLOCK_N, REDUCTION.HAS_STATS)
            loss += tl.where(keep, token * loss_row, 0.0)
        if shares.weight is None:
            share += token
        else:
            here = keep & (target >= 0) & (target < classes)
            share += token * tl.load(shares.weight + target, mask=here, other=0.0).to(ACC)
    loss, share, count = tl.sum(loss), tl.sum(share), tl.sum(count).to(tl.int64)
    if sums_out is None:
        store_totals(out, shares.normalizer, number, loss, share, count, ACC, REDUCTION)
    else:
        tl.store(sums_out.partial + pid, loss)
        tl.store(sums_out.partial + tl.num_programs(0) + pid, share)
        tl.store(sums_out.count + pid, count)


@triton.jit(do_not_specialize=["programs"])
def total_kernel(
    sums: ProgramSums,
    normalizer_ptr,  # a scalar or None
    number: tl.float64,  # the normalizer, if it is a number
    out: Totals,
    programs,
    BLOCK: tl.constexpr,
    REDUCTION: tl.constexpr,  # Reduction
):
    ACC: tl.constexpr = sums.partial.dtype.element_ty
    offs = tl.arange(0, BLOCK)
    there = offs < programs
    loss = tl.sum(tl.load(sums.partial + offs, mask=there, other=0.0))
    share = tl.sum(tl.load(sums.partial + programs + offs, mask=there, other=0.0))
    count = tl.sum(tl.load(sums.count + offs, mask=there, other=0))
    store_totals(out, normalizer_ptr, number, loss, share, count, ACC, REDUCTION)
