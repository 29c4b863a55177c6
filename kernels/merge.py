"""Merges the sums over parts of rows."""

import triton
import triton.language as tl

from .device_math import LOWEST, whole_shift
from .structs import Parts, Rows, RowSums
from .sums import store_kept


@triton.jit
def merge_rows(rows_out, parts, row, N, inside, keep, BLOCK_N: tl.constexpr, HAS_STATS: tl.constexpr):
    """Merges the parts (`Parts`) of each row and stores the row's results (`Rows`); returns (loss, lse)."""
    field = tl.cast(parts.count, tl.int64) * N
    zero = tl.zeros((BLOCK_N,), parts.partial.dtype.element_ty)
    largest, c = zero + float("-inf"), zero + LOWEST
    s, r, mass, d = zero, zero, zero, zero
    predicted = tl.zeros((BLOCK_N,), tl.int64)
    for i in range(0, parts.count):
        part = parts.partial + row + i * N
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
            predicted_part = tl.load(parts.argmax + row + i * N, mask=keep, other=0)
            predicted = tl.where((largest_part > largest) | (i == 0), predicted_part, predicted)
        s = s * alpha + s_part * beta
        largest = tl.maximum(largest, largest_part)
        c = c_new
    sums = RowSums(c=c, s=s, r=r, mass=mass, d=d, largest=largest, predicted=predicted)
    return store_kept(rows_out, row, N, inside, keep, sums)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def merge_kernel(
    target_ptr,  # (N,) int64
    rows_out: Rows,
    parts: Parts,
    N: tl.int64,
    ignore_index: tl.int64,
    BLOCK_N: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    keep = inside & (tl.load(target_ptr + row, mask=inside, other=ignore_index) != ignore_index)
    merge_rows(rows_out, parts, row, N, inside, keep, BLOCK_N, HAS_STATS)
