"""Reduces rows to a scalar in one small launch: the sum, the number of kept rows, and the divisor of "mean".

A program adds what its lanes have in a fixed order, so that the same rows give the same bits. Where rows are very
many, several programs leave their sums, and a second launch puts them together. Where they are few, so that forward
has left them in parts, the same program merges these first.
"""

import triton
import triton.language as tl

from .merge import merge_rows


@triton.jit
def store_total(
    out, normalizer_ptr, number, loss, of_z, share, tokens, count, z_loss,
    MEAN: tl.constexpr, HAS_NUMBER: tl.constexpr, HAS_Z: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the total, the number of kept rows, and the factor of every row's gradient; `out` has their pointers."""
    divisor, divisor_z = tl.full((), 1.0, ACC), tl.full((), 1.0, ACC)
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr).to(ACC)
        divisor_z = divisor
    elif HAS_NUMBER:
        divisor = tl.full((), number, ACC)
        divisor_z = divisor
    elif MEAN:
        divisor, divisor_z = share, tokens
    total = loss / divisor
    if HAS_Z:
        total += tl.full((), z_loss, ACC) * of_z / divisor_z
    tl.store(out[0], total.to(out[0].dtype.element_ty))
    tl.store(out[1], count)
    tl.store(out[2], 1.0 / divisor)


@triton.jit(do_not_specialize=["N", "rows", "ignore_index"])
def reduce_kernel(
    rows_out,  # pointers to loss (N,) and lse (N,); or, with `parts`, where `store_row` writes
    parts,  # see `merge_rows`; or None
    target_ptr,  # (N,) int64
    weights,  # of classes from `first_class` on, of targets (N,), of tokens (N,); pointers, or None
    normalizer_ptr,  # a scalar or None
    sums,  # pointers to (4, programs) and (programs,) int64; or None, for the only program
    out,  # see `store_total`
    number: tl.float64,
    N: tl.int64,
    rows,  # of a program
    place,  # (first_class, classes, stride of the token weights)
    ignore_index: tl.int64,
    z_loss: tl.float64,
    BLOCK_N: tl.constexpr,
    OPTIONS: tl.constexpr,  # (MEAN, HAS_NUMBER, HAS_Z, HAS_STATS)
):
    ACC: tl.constexpr = rows_out[0].dtype.element_ty
    weight_ptr, target_weight_ptr, token_weight_ptr = weights
    first_class, classes, stride_tw = place
    pid = tl.program_id(0)
    zero = tl.zeros((BLOCK_N,), ACC)
    loss, of_z, share, tokens = zero, zero, zero, zero
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
        tokens += token
        if parts is None:
            loss_row = tl.load(rows_out[0] + row, mask=keep, other=0.0)
            lse_row = tl.load(rows_out[1] + row, mask=keep, other=0.0)
        else:
            loss_row, lse_row = merge_rows(rows_out, parts, row, N, inside, keep, BLOCK_N, OPTIONS[3])
        loss += tl.where(keep, token * loss_row, 0.0)
        if OPTIONS[2]:
            of_z += token * lse_row * lse_row
        if weight_ptr is not None:
            local = target - first_class
            here = keep & (local >= 0) & (local < classes)
            share += token * tl.load(weight_ptr + local, mask=here, other=0.0).to(ACC)
        elif target_weight_ptr is not None:
            share += token * tl.load(target_weight_ptr + row, mask=keep, other=0.0).to(ACC)
        else:
            share += token
    loss, of_z, share, tokens = tl.sum(loss), tl.sum(of_z), tl.sum(share), tl.sum(tokens)
    count = tl.sum(count).to(tl.int64)
    if sums is None:
        store_total(
            out, normalizer_ptr, number, loss, of_z, share, tokens, count, z_loss,
            OPTIONS[0], OPTIONS[1], OPTIONS[2], ACC,
        )  # fmt: skip
    else:
        partial_ptr, count_ptr = sums
        programs = tl.num_programs(0)
        tl.store(partial_ptr + pid, loss)
        tl.store(partial_ptr + programs + pid, of_z)
        tl.store(partial_ptr + 2 * programs + pid, share)
        tl.store(partial_ptr + 3 * programs + pid, tokens)
        tl.store(count_ptr + pid, count)


@triton.jit(do_not_specialize=["programs"])
def total_kernel(
    partial_ptr,  # (4, programs)
    count_ptr,  # (programs,) int64
    normalizer_ptr,  # a scalar or None
    out,  # see `store_total`
    number: tl.float64,
    programs,
    z_loss: tl.float64,
    BLOCK: tl.constexpr,
    OPTIONS: tl.constexpr,  # (MEAN, HAS_NUMBER, HAS_Z, HAS_STATS)
):
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK)
    there = offs < programs
    loss = tl.sum(tl.load(partial_ptr + offs, mask=there, other=0.0))
    of_z = tl.sum(tl.load(partial_ptr + programs + offs, mask=there, other=0.0))
    share = tl.sum(tl.load(partial_ptr + 2 * programs + offs, mask=there, other=0.0))
    tokens = tl.sum(tl.load(partial_ptr + 3 * programs + offs, mask=there, other=0.0))
    count = tl.sum(tl.load(count_ptr + offs, mask=there, other=0))
    store_total(
        out, normalizer_ptr, number, loss, of_z, share, tokens, count, z_loss,
        OPTIONS[0], OPTIONS[1], OPTIONS[2], ACC,
    )  # fmt: skip
