"""Merges the sums over parts of rows."""

import triton
import triton.language as tl

from .device_math import LOWEST, whole_shift
from .sums import store_kept


@triton.jit
def merge_rows(rows_out, parts, row, N, inside, keep, BLOCK_N: tl.constexpr, HAS_STATS: tl.constexpr):
    """Merges the parts of each row and writes the row's outputs as `store_row` does; returns (loss, lse).

    `parts` is (pointer to (5, parts, N), pointer to (parts, N), number of parts), as `store_part` fills them.
    """
    partial_ptr, argmax_ptr, count = parts
    field = tl.cast(count, tl.int64) * N
    zero = tl.zeros((BLOCK_N,), partial_ptr.dtype.element_ty)
    largest, c = zero + float("-inf"), zero + LOWEST
    s, r, mass, d = zero, zero, zero, zero
    predicted = tl.zeros((BLOCK_N,), tl.int64)
    for i in range(0, count):
        part = partial_ptr + row + i * N
        largest_part = tl.load(part, mask=keep, other=float("-inf"))
        s_part = tl.load(part + field, mask=keep, other=0.0)
        r_part = tl.load(part + 2 * field, mask=keep, other=0.0)
        mass_part = tl.load(part + 3 * field, mask=keep, other=0.0)
        c_part = whole_shift(largest_part)
        c_new = tl.maximum(c, c_part)
        alpha, beta = tl.exp2(c - c_new), tl.exp2(c_part - c_new)
        r += mass * (c - c_new) + r_part + mass_part * (c_part - c_new)
        mass += mass_part
        if HAS_STATS:
            d_part = tl.load(part + 4 * field, mask=keep, other=0.0)
            d = alpha * (d + s * (c - c_new)) + beta * (d_part + s_part * (c_part - c_new))
            predicted_part = tl.load(argmax_ptr + row + i * N, mask=keep, other=0)
            predicted = tl.where((largest_part > largest) | (i == 0), predicted_part, predicted)
        s = s * alpha + s_part * beta
        largest = tl.maximum(largest, largest_part)
        c = c_new
    return store_kept(rows_out, row, N, inside, keep, c, s, r, mass, d, predicted)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def merge_kernel(
    target_ptr,  # (N,) int64
    rows_out,  # where `store_row` writes
    parts,  # see `merge_rows`
    N: tl.int64,
    ignore_index: tl.int64,
    BLOCK_N: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    keep = inside & (tl.load(target_ptr + row, mask=inside, other=ignore_index) != ignore_index)
    merge_rows(rows_out, parts, row, N, inside, keep, BLOCK_N, HAS_STATS)
