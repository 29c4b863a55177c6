"""Reduces rows to a scalar in one small launch: the sum, the number of kept rows, and the divisor of "mean".

The order of additions is fixed, so that the same rows give the same bits. If rows are very many, several programs
store their sums, and a second launch adds these. If rows are so few that forward has split them into parts, the
program first merges the parts.
"""

import triton
import triton.language as tl

from .merge import merge_rows


@triton.jit
def store_total(
    out, normalizer_ptr, number, loss, share, count, MEAN: tl.constexpr, HAS_NUMBER: tl.constexpr, ACC: tl.constexpr
):
    """Divides the sums and stores the results.

    `out` holds pointers to the total (or None), the factor of every row's gradient, and the number of kept rows (or
    None).
    """
    divisor = tl.full((), 1.0, ACC)
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr).to(ACC)
    elif HAS_NUMBER:
        divisor = tl.full((), number, ACC)
    elif MEAN:
        divisor = share
    if out[0] is not None:
        tl.store(out[0], (loss / divisor).to(out[0].dtype.element_ty))
    tl.store(out[1], 1.0 / divisor)
    if out[2] is not None:
        tl.store(out[2], count)


@triton.jit(do_not_specialize=["N", "rows", "classes", "stride_tw", "ignore_index"])
def reduce_kernel(
    target_ptr,  # (N,) int64
    weight_ptr,  # (classes,), or None
    token_weight_ptr,  # (N,) or None
    normalizer_ptr,  # a scalar or None
    number: tl.float64,  # the normalizer, if it is a number
    rows_out,  # a pointer to loss (N,); or, with `parts`, where `store_row` writes; None if no total is wanted
    parts,  # see `merge_rows`; or None
    sums,  # pointers to (2, programs) and (programs,) int64; or None, for the only program
    out,  # see `store_total`
    N: tl.int64,
    rows,  # per program
    classes,
    stride_tw,  # of the token weights
    ignore_index: tl.int64,
    BLOCK_N: tl.constexpr,
    OPTIONS: tl.constexpr,  # (MEAN, HAS_NUMBER, HAS_STATS)
):
    ACC: tl.constexpr = out[1].dtype.element_ty
    pid = tl.program_id(0)
    zero = tl.zeros((BLOCK_N,), ACC)
    loss, share = zero, zero
    count = tl.zeros((BLOCK_N,), tl.int32)
    start = tl.cast(pid, tl.int64) * rows
    end = tl.minimum(start + rows, N)
    for first in range(start, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < end
        target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
        keep = inside & (target != ignore_index)
        count += keep.to(tl.int32)
        token = tl.where(keep, 1.0, 0.0).to(ACC)
        if token_weight_ptr is not None:
            token = tl.load(token_weight_ptr + row * stride_tw, mask=keep, other=0.0).to(ACC)
        if out[0] is not None:
            if parts is None:
                loss_row = tl.load(rows_out[0] + row, mask=keep, other=0.0)
            else:
                loss_row, _ = merge_rows(rows_out, parts, row, N, inside, keep, BLOCK_N, OPTIONS[2])
            loss += tl.where(keep, token * loss_row, 0.0)
        if weight_ptr is None:
            share += token
        else:
            here = keep & (target >= 0) & (target < classes)
            share += token * tl.load(weight_ptr + target, mask=here, other=0.0).to(ACC)
    loss, share, count = tl.sum(loss), tl.sum(share), tl.sum(count).to(tl.int64)
    if sums is None:
        store_total(out, normalizer_ptr, number, loss, share, count, OPTIONS[0], OPTIONS[1], ACC)
    else:
        partial_ptr, count_ptr = sums
        tl.store(partial_ptr + pid, loss)
        tl.store(partial_ptr + tl.num_programs(0) + pid, share)
        tl.store(count_ptr + pid, count)


@triton.jit(do_not_specialize=["programs"])
def total_kernel(
    partial_ptr,  # (2, programs)
    count_ptr,  # (programs,) int64
    normalizer_ptr,  # a scalar or None
    number: tl.float64,
    out,  # see `store_total`
    programs,
    BLOCK: tl.constexpr,
    OPTIONS: tl.constexpr,  # (MEAN, HAS_NUMBER)
):
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK)
    there = offs < programs
    loss = tl.sum(tl.load(partial_ptr + offs, mask=there, other=0.0))
    share = tl.sum(tl.load(partial_ptr + programs + offs, mask=there, other=0.0))
    count = tl.sum(tl.load(count_ptr + offs, mask=there, other=0))
    store_total(out, normalizer_ptr, number, loss, share, count, OPTIONS[0], OPTIONS[1], ACC)
