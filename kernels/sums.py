"""The sums over a row's classes, lane by lane, and the loss from them.

With y the used logits in base two, q the target distribution over classes (class weights multiplied in) and a whole
shift `c` (see `device_math`):

    s = sum 2^(y - c)    r = sum q (y - c)    mass = sum q    d = sum 2^(y - c) (y - c)
    lse = ln2 (c + log2 s)    loss = ln2 (mass log2 s - r)    entropy = ln2 (log2 s - d / s)

The normaliser is kept as the pair (c, s): `x - lse` would round at the size of `lse`, `(y - c) - log2 s` does not.
"""

import triton
import triton.language as tl

from .device_math import (
    LN2,
    LOWEST,
    NO_CLASS,
    by_lane,
    exponent,
    fused_multiply_add,
    lane_max,
    lane_sum,
    over_lanes,
    over_tile,
    row_max,
    row_min_of_tile,
    row_sum,
    used_logits,
    weighted,
    whole_shift,
)
from .tiles import load_tile, load_weights


@triton.jit
def soft_target(rows, v, offs, weight_ptr, soft, ACC: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The part of the target distribution that does not come from an index target, for each class of a tile.

    `soft` is (1 - smoothing, the smoothing's share of one class). Where targets are indices and classes have no
    weights, this share is the same number for every class.
    """
    _, _, probs_row, stride_pv, keep, v_end = rows
    inside = offs < v_end - v
    if probs_row is None:
        q = soft[1]
    else:
        q = load_tile(probs_row, v, offs, stride_pv, keep, v_end, 0.0, TILE[0], WHOLE, "").to(ACC) * soft[0] + soft[1]
    if weight_ptr is not None:
        q = q * load_weights(weight_ptr, v, offs, v_end, TILE[0], TILE[3]).to(ACC)
    if not WHOLE:
        q = tl.where(inside, q, 0.0)
    return q


@triton.jit
def add_tile(
    lanes, rows, v, offs, loss, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BEST: tl.constexpr, HAS_STATS: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Adds the tile that starts at class `v` to the lanes' sums."""
    c, s, r, mass, d, best, at = lanes
    weight_ptr, soft, curve = loss
    x_row, stride_xv, probs_row, _, keep, v_end = rows
    x = load_tile(x_row, v, offs, stride_xv, keep, v_end, float("-inf"), TILE[0], WHOLE, EVICT)
    u, _ = used_logits(x, curve, ACC, OPTIONS)
    if (OPTIONS[1] or OPTIONS[2]) and not WHOLE:
        u = tl.where(offs < v_end - v, u, float("-inf"))
    ONE_NUMBER: tl.constexpr = WHOLE and probs_row is None and weight_ptr is None
    if OPTIONS[0]:
        q = soft_target(rows, v, offs, weight_ptr, soft, ACC, TILE, WHOLE)
        if not ONE_NUMBER:
            # `u == u` is for the compiler: it would give a sum of q alone other threads than the tile's, and a barrier.
            q = by_lane(tl.where(u == u, q, 0.0), TILE)
    u = by_lane(u, TILE)
    largest = lane_max(u)
    if HAS_BEST:
        at = tl.where(largest > best, v, at)
        best = tl.maximum(best, largest)
    c_new = tl.maximum(c, tl.floor(largest * curve[1]))
    z = exponent(u, curve[1], c_new)
    e = tl.exp2(z)
    alpha = tl.exp2(c - c_new)
    if OPTIONS[0]:
        r += mass * (c - c_new)
        if ONE_NUMBER:
            r += q * lane_sum(z)
            mass += q * (TILE[1] * TILE[3])
        else:
            r += lane_sum(weighted(q, z))
            mass += lane_sum(q)
    if HAS_STATS:
        # A masked class adds 0 * -200, and not 0 * -inf, which is NaN.
        d = alpha * (d + s * (c - c_new)) + lane_sum(e * tl.maximum(z, -200.0))
    s = s * alpha + lane_sum(e)
    return c_new, s, r, mass, d, best, at


@triton.jit
def first_of_largest(
    best, at, rows, v_start, offs, curve, largest, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """The first class with the row's largest logit, found by reading again the tiles where lanes met that logit."""
    x_row, stride_xv, _, _, keep, v_end = rows
    place = over_tile(at, TILE) + offs
    met = keep & (over_tile(best, TILE) == largest) & (place < v_end)
    x = tl.load(x_row + place.to(tl.int64) * stride_xv, mask=met, other=float("nan"))
    u, _ = used_logits(x, curve, ACC, OPTIONS)
    first = row_min_of_tile(tl.where(u == largest, place, NO_CLASS))
    return tl.where(first == NO_CLASS, v_start, first)


@triton.jit
def row_sums(
    rows, v_start, offs, loss, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    HAS_BEST: tl.constexpr, HAS_STATS: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """(c, s, r, mass, d, largest, predicted) of each row's classes from `v_start` on, without index targets' terms.

    `rows` is (x_row, stride_xv, probs_row, stride_pv, keep, v_end), and `loss` is (weight_ptr, soft, curve). `largest`
    is a value that `used_logits` returns.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    LANES: tl.constexpr = TILE[2]
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    zero = tl.zeros((BLOCK_N, 1, LANES, 1), ACC)
    at = tl.zeros((BLOCK_N, 1, LANES, 1), tl.int32) + v_start
    lanes = (zero + LOWEST, zero, zero, zero, zero, zero + float("-inf"), at)
    v_end = rows[5]
    whole_end = v_start
    if BLOCK_N == 1:  # tiles of several rows need their masks all along
        whole_end += (v_end - v_start) // BLOCK_V * BLOCK_V
        for v in range(v_start, whole_end, BLOCK_V):
            lanes = add_tile(lanes, rows, v, offs, loss, ACC, TILE, OPTIONS, True, HAS_BEST, HAS_STATS, EVICT)
        if whole_end < v_end:
            lanes = add_tile(lanes, rows, whole_end, offs, loss, ACC, TILE, OPTIONS, False, HAS_BEST, HAS_STATS, EVICT)
    else:
        for v in range(v_start, v_end, BLOCK_V):
            lanes = add_tile(lanes, rows, v, offs, loss, ACC, TILE, OPTIONS, False, HAS_BEST, HAS_STATS, EVICT)

    c, s, r, mass, d, best, at = lanes
    c_row = row_max(c)
    down = c - over_lanes(c_row, TILE)
    power = tl.exp2(down)
    if HAS_STATS:
        d = row_sum(power * (d + s * down))
    if OPTIONS[0]:
        r = row_sum(r + mass * down)
        mass = row_sum(mass)
    s = row_sum(s * power)
    predicted = at
    largest = best
    if HAS_BEST:
        largest = row_max(best)
    if HAS_STATS:
        predicted = first_of_largest(best, at, rows, v_start, offs, loss[2], largest, ACC, TILE, OPTIONS)
    if not OPTIONS[0]:
        r, mass = s * 0.0, s * 0.0
    return c_row, s, r, mass, d, largest, predicted


@triton.jit
def target_weight(weight_ptr, local, own, ACC: tl.constexpr):
    """The class weight of an index target; 0 where it is not `own`, among the classes that this program has."""
    w = tl.where(own, 1.0, 0.0).to(ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + local, mask=own, other=0.0).to(ACC)
    return w


@triton.jit
def cross_entropy(s, r, mass):
    """`ln2 (mass log2 s - r)` as the logarithm of a quotient, so that a target of probability 1 costs exactly 0."""
    mean = tl.div_rn(r, mass) if r.dtype == tl.float32 else r / mass
    power = tl.exp2(mean)
    quotient = tl.div_rn(s, power) if s.dtype == tl.float32 else s / power
    # The comparison is false for NaN too, which rows without mass or with infinite logits have.
    return LN2 * tl.where(tl.abs(mean) < 100.0, mass * tl.log2(quotient), mass * tl.log2(s) - r)


@triton.jit
def store_row(rows_out, row, N, inside, loss, lse, c, s, mass, predicted, entropy):
    """Stores the outputs of rows.

    `rows_out` holds pointers to loss (N,), lse (N,) or None, norm (3, N), predicted and entropy (N,) or None.
    """
    loss_ptr, lse_ptr, norm_ptr, predicted_ptr, entropy_ptr = rows_out
    tl.store(loss_ptr + row, loss, mask=inside)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(norm_ptr + row, c, mask=inside)
    tl.store(norm_ptr + N + row, s, mask=inside)
    tl.store(norm_ptr + 2 * N + row, mass, mask=inside)
    if entropy_ptr is not None:
        tl.store(predicted_ptr + row, predicted, mask=inside)
        tl.store(entropy_ptr + row, entropy, mask=inside)


@triton.jit
def store_kept(rows_out, row, N, inside, keep, c, s, r, mass, d, predicted):
    """Stores the outputs of rows from their sums, and zeros for ignored rows; returns (loss, lse)."""
    s = tl.where(keep, s, 1.0)
    log_s = tl.log2(s)
    loss = tl.where(keep, cross_entropy(s, r, mass), 0.0)
    lse = tl.where(keep, fused_multiply_add(c, tl.full((), LN2, c.dtype), log_s * LN2), 0.0)
    entropy = tl.where(keep, LN2 * (log_s - d / s), 0.0)
    c, s, mass = tl.where(keep, c, 0.0), tl.where(keep, s, 0.0), tl.where(keep, mass, 0.0)
    store_row(rows_out, row, N, inside, loss, lse, c, s, mass, tl.where(keep, predicted, 0), entropy)
    return loss, lse


@triton.jit
def store_part(parts, at, keep, c, s, r, mass, d, largest, predicted, HAS_STATS: tl.constexpr):
    """Stores the sums over a part of each kept row.

    `parts` is (pointer into (5, parts, N), pointer into (parts, N), stride between the five fields). The shift is not
    stored: it follows from the largest used logit, which is stored, as the argmax is chosen by it.
    """
    partial_ptr, argmax_ptr, field = parts
    shift = whole_shift(largest)
    back = tl.exp2(c - shift)
    tl.store(partial_ptr + at, largest, mask=keep)
    tl.store(partial_ptr + at + field, s * back, mask=keep)
    tl.store(partial_ptr + at + 2 * field, r + mass * (c - shift), mask=keep)
    tl.store(partial_ptr + at + 3 * field, mass, mask=keep)
    if HAS_STATS:
        tl.store(partial_ptr + at + 4 * field, back * (d + s * (c - shift)), mask=keep)
        tl.store(argmax_ptr + at, predicted, mask=keep)
