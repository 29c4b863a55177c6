"""Merges the sums over parts of rows."""

import triton
import triton.language as tl

from .device_math import LN2, capped_curve, lowest, shift_of
from .structs import Parts, Rows, RowSums
from .sums import store_kept


@triton.jit
def merge_rows(rows_out, parts, row, N, inside, keep, cap, BLOCK_N: tl.constexpr, HAS_STATS: tl.constexpr):
    """Merges the parts (`Parts`) of each row and stores the row's results (`Rows`); returns (loss, lse)."""
    field = tl.cast(parts.count, tl.int64) * N
    ACC: tl.constexpr = parts.partial.dtype.element_ty
    curve = capped_curve(1.0, cap, ACC)
    zero = tl.zeros((BLOCK_N,), ACC)
    largest, c = zero + float("-inf"), zero + lowest(zero)
    s, r, mass, d = zero, zero, zero, zero
    far = zero < 0
    predicted = tl.zeros((BLOCK_N,), tl.int64)
    for i in range(0, parts.count):
        part = parts.partial + row + i * N
        largest_part = tl.load(part, mask=keep, other=float("-inf"))
        s_part = tl.load(part + field, mask=keep, other=0.0)
        r_part = tl.load(part + 2 * field, mask=keep, other=0.0)
        mass_part = tl.load(part + 3 * field, mask=keep, other=0.0)
        c_part, far_part = shift_of(largest_part, curve)
        c_new, far_new = shift_of(tl.maximum(largest, largest_part), curve)
        down, power, unit = rebase(c, far, c_new, far_new, curve)
        down_part, power_part, unit_part = rebase(c_part, far_part, c_new, far_new, curve)
        r = r * unit + mass * down + r_part * unit_part + mass_part * down_part
        mass += mass_part
        if HAS_STATS:
            d_part = tl.load(part + 4 * field, mask=keep, other=0.0)
            d = moved_entropy(d, s, down, power) + moved_entropy(d_part, s_part, down_part, power_part)
            predicted_part = tl.load(parts.argmax + row + i * N, mask=keep, other=0)
            predicted = tl.where((largest_part > largest) | (i == 0), predicted_part, predicted)
        s = s * power + s_part * power_part
        largest = tl.maximum(largest, largest_part)
        c, far = c_new, far_new
    sums = RowSums(c=c, s=s, r=r, mass=mass, d=d, largest=largest, predicted=predicted, far=far)
    return store_kept(rows_out, row, N, inside, keep, sums, curve)


@triton.jit
def rebase(c, far, c_new, far_new, curve):
    """What makes sums relative to `c` relative to `c_new`: (a quarter of c - c_new, its power of two, units of c)."""
    same = far == far_new
    # Rounded correctly: a loss of the largest finite number would overflow.
    ln2 = tl.full((), LN2, curve.nats.dtype)
    if curve.nats.dtype == tl.float32:
        ratio = tl.where(far, tl.div_rn(curve.nats, ln2), tl.div_rn(ln2, curve.nats))
    else:
        ratio = tl.where(far, curve.nats / ln2, ln2 / curve.nats)
    unit = tl.where(same, 1.0, ratio)
    down = 0.25 * c * unit - 0.25 * c_new
    return down, tl.where(same, tl.exp2(4.0 * down), 0.0), unit


@triton.jit
def moved_entropy(d, s, down, power):
    """`d` relative to the new shift; 0 * inf = 0."""
    return tl.where(power == 0.0, 0.0, power * (d + s * 4.0 * down))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def merge_kernel(
    target_ptr,  # (N,) int64
    rows_out: Rows,
    parts: Parts,
    N: tl.int64,
    ignore_index: tl.int64,
    cap: tl.float64,
    BLOCK_N: tl.constexpr,
    HAS_STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    keep = inside & (tl.load(target_ptr + row, mask=inside, other=ignore_index) != ignore_index)
    merge_rows(rows_out, parts, row, N, inside, keep, cap, BLOCK_N, HAS_STATS)
