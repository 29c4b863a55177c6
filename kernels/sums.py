"""The sums over a row's classes, lane by lane, and the loss from them.

With y the used logits in base two, q the target distribution over classes (class weights multiplied in) and a whole
shift `c` (see `device_math`):

    s = sum 2^(y - c)    r = sum q (y - c)    mass = sum q    d = sum 2^(y - c) (y - c)
    lse = ln2 (c + log2 s)    loss = ln2 (mass log2 s - r)    entropy = ln2 (log2 s - d / s)

A row is walked once. Where that overflows, as it does for some logits beyond 1e9, `careful_sums` walks it again.

The normaliser is kept as the pair (c, s): `x - lse` would round at the size of `lse`, `(y - c) - log2 s` does not.
"""

import triton
import triton.language as tl

from .device_math import (
    LN2,
    NO_CLASS,
    by_lane,
    exponent,
    fused_multiply_add,
    lane_max,
    lane_sum,
    lowest,
    over_lanes,
    over_tile,
    row_any,
    row_curve,
    row_max,
    row_min_of_tile,
    row_sum,
    shift_of,
    used_logits,
    weighted,
)
from .structs import LaneSums, RowSums
from .tiles import load_tile, load_weights, tile_offsets


@triton.jit
def soft_target(inputs, v, offs, options, ACC: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """The part of the target distribution that does not come from an index target, for each class of a tile.

    Where targets are indices and classes have no weights, it is the smoothing's share, the same for every class.
    """
    inside = offs < inputs.v_end - v
    if inputs.probs is None:
        q = options.smoothing.share
    else:
        q = load_tile(inputs.probs, v, offs, inputs.stride_pv, inputs.keep, inputs.v_end, 0.0, TILE, WHOLE, "").to(ACC)
        q = q * options.smoothing.confidence + options.smoothing.share
    if inputs.weight is not None:
        q = q * load_weights(inputs.weight, v, offs, inputs.v_end, TILE, WHOLE).to(ACC)
    if not WHOLE:
        q = tl.where(inside, q, 0.0)
    return q


@triton.jit
def add_tile(
    lanes, inputs, v, offs, options, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BEST: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The lanes' sums (`LaneSums`) with the tile that starts at class `v` added."""
    x = load_tile(inputs.x, v, offs, inputs.stride_xv, inputs.keep, inputs.v_end, float("-inf"), TILE, WHOLE, EVICT)
    return add_logits(lanes, x, inputs, v, offs, options, ACC, TILE, OPTIONS, WHOLE, HAS_BEST)


@triton.jit
def add_logits(
    lanes, x, inputs, v, offs, options, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    WHOLE: tl.constexpr, HAS_BEST: tl.constexpr,
):  # fmt: skip
    """The lanes' sums (`LaneSums`) with a tile of logits added, which is -inf beyond the classes."""
    height = options.curve.height
    u, _ = used_logits(x, options.curve, ACC, OPTIONS)
    if (OPTIONS.HAS_SCALE or OPTIONS.HAS_SOFTCAP) and not WHOLE:
        u = tl.where(offs < inputs.v_end - v, u, float("-inf"))
    ONE_NUMBER: tl.constexpr = inputs.probs is None and inputs.weight is None
    if OPTIONS.HAS_SOFT and not ONE_NUMBER:
        q = soft_target(inputs, v, offs, options, ACC, TILE, WHOLE)
        if len(offs.shape) == 3:  # The compiler would give a sum of q alone other threads than the tile's: a barrier.
            q = by_lane(tl.where(u == u, q, 0.0), TILE)
    elif OPTIONS.HAS_SOFT and not WHOLE:
        inside = by_lane(tl.where((u == u) & (offs < inputs.v_end - v), 1.0, 0.0), TILE)
    u = by_lane(u, TILE)
    largest = lane_max(u)
    best, at = lanes.best, lanes.at
    if HAS_BEST:
        best, at = tl.maximum(best, largest), tl.where(largest > best, v, at)
    c = tl.maximum(lanes.c, tl.floor(largest * height))
    z = exponent(u, height, c)
    e = tl.exp2(z)
    alpha = tl.exp2(lanes.c - c)
    r, mass, d = lanes.r, lanes.mass, lanes.d
    if OPTIONS.HAS_SOFT:
        r += mass * (lanes.c - c)
        if ONE_NUMBER and WHOLE:
            r += options.smoothing.share * lane_sum(z)
            mass += options.smoothing.share * (TILE.CHUNKS * TILE.WIDTH)
        elif ONE_NUMBER:
            r += options.smoothing.share * lane_sum(tl.where(inside == 0.0, 0.0, z))
            mass += options.smoothing.share * lane_sum(inside)
        else:
            r += lane_sum(weighted(q, z))
            mass += lane_sum(q)
    if OPTIONS.HAS_STATS:
        # A masked class adds 0 * -200, and not 0 * -inf, which is NaN.
        d = alpha * (d + lanes.s * (lanes.c - c)) + lane_sum(e * tl.maximum(z, -200.0))
    s = lanes.s * alpha + lane_sum(e)
    return LaneSums(c=c, s=s, r=r, mass=mass, d=d, best=best, at=at)


@triton.jit
def first_of_largest(
    lanes, inputs, v_start, offs, curve, largest, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr
):
    """The first class with the row's largest logit, found by reading again the tiles where lanes met that logit."""
    ON_CHIP: tl.constexpr = len(offs.shape) == 4
    place = over_tile(lanes.at, TILE, ON_CHIP) + offs
    met = inputs.keep & (over_tile(lanes.best, TILE, ON_CHIP) == largest) & (place < inputs.v_end)
    x = tl.load(inputs.x + place.to(tl.int64) * inputs.stride_xv, mask=met, other=float("nan"))
    u, _ = used_logits(x, curve, ACC, OPTIONS)
    first = row_min_of_tile(tl.where(u == largest, place, NO_CLASS), TILE)
    return tl.where(first == NO_CLASS, v_start, first)


@triton.jit
def row_sums(
    inputs, v_start, offs, options, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    HAS_BEST: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The sums (`RowSums`) of each row's classes from `v_start` on, without index targets' terms."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    LANES: tl.constexpr = TILE.LANES
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    zero = tl.zeros((BLOCK_N, 1, LANES, 1), ACC)
    at = zero.to(tl.int32) + v_start
    lanes = LaneSums(c=zero + lowest(zero), s=zero, r=zero, mass=zero, d=zero, best=zero + float("-inf"), at=at)
    whole_end = v_start
    if TILE.BLOCK_N == 1:  # tiles of several rows need their masks all along
        whole_end += (inputs.v_end - v_start) // BLOCK_V * BLOCK_V
        for v in range(v_start, whole_end, BLOCK_V):
            lanes = add_tile(lanes, inputs, v, offs, options, ACC, TILE, OPTIONS, True, HAS_BEST, EVICT)
        if whole_end < inputs.v_end:
            lanes = add_tile(lanes, inputs, whole_end, offs, options, ACC, TILE, OPTIONS, False, HAS_BEST, EVICT)
    else:
        for v in range(v_start, inputs.v_end, BLOCK_V):
            lanes = add_tile(lanes, inputs, v, offs, options, ACC, TILE, OPTIONS, False, HAS_BEST, EVICT)
    one_chunk = tile_offsets(TILE, 1)  # takes the fewest registers
    return merged_lanes(lanes, inputs, v_start, offs, one_chunk, zero, options, ACC, TILE, OPTIONS, HAS_BEST)


@triton.jit
def merged_lanes(
    lanes, inputs, v_start, offs, one_chunk, zero, options, ACC: tl.constexpr, TILE: tl.constexpr,
    OPTIONS: tl.constexpr, HAS_BEST: tl.constexpr,
):  # fmt: skip
    """The sums (`RowSums`) of each row's classes from `v_start` on, from those of its lanes (`LaneSums`)."""
    c = row_max(lanes.c, TILE)
    down = lanes.c - over_lanes(c, TILE)
    power = tl.exp2(down)
    r, mass, d = lanes.r, lanes.mass, lanes.d
    if OPTIONS.HAS_STATS:
        d = row_sum(power * (d + lanes.s * down), TILE)
    if OPTIONS.HAS_SOFT:
        r = row_sum(r + mass * down, TILE)
        mass = row_sum(mass, TILE)
    s = row_sum(lanes.s * power, TILE)
    predicted, largest = lanes.at, lanes.best
    if HAS_BEST:
        largest = row_max(largest, TILE)
    if OPTIONS.HAS_STATS:
        predicted = first_of_largest(lanes, inputs, v_start, offs, options.curve, largest, ACC, TILE, OPTIONS)
    if OPTIONS.HAS_SOFT:
        r *= 0.25
    far = s < 0.0
    # False for NaN, too. With the largest shifts, s is at most 2^64 times the number of classes.
    sound = (s > 2.0**-100) & (s < 2.0**100) & (tl.abs(c) < -lowest(c))
    if OPTIONS.HAS_SOFT:
        sound &= tl.abs(r) < float("inf")
    strange = inputs.keep & (sound == 0)
    if row_any(strange, TILE):
        c_new, s_new, r_new, mass_new, d_new, far_new = careful_sums(
            inputs, v_start, one_chunk, zero, options, ACC, TILE, OPTIONS
        )
        c, s, far = tl.where(strange, c_new, c), tl.where(strange, s_new, s), strange & far_new
        if OPTIONS.HAS_SOFT:
            r, mass = tl.where(strange, r_new, r), tl.where(strange, mass_new, mass)
        if OPTIONS.HAS_STATS:
            d = tl.where(strange, d_new, d)
    if not OPTIONS.HAS_SOFT:
        r, mass = s * 0.0, s * 0.0
    return RowSums(c=c, s=s, r=r, mass=mass, d=d, largest=largest, predicted=predicted, far=far)


@triton.jit
def careful_sums(inputs, v_start, offs, zero, options, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """The sums of each row, whatever its logits are, in two walks: one finds the largest logit, one adds.

    A quarter of an exponent does not overflow, though the exponent may.
    """
    BLOCK_V: tl.constexpr = TILE.LANES * TILE.WIDTH  # of the one chunk that `offs` has
    curve = options.curve
    tiles = tl.cdiv(inputs.v_end - v_start, BLOCK_V)
    # The sign of `v_end` is 0, which the compiler does not know. With a known step, it would unroll these loops, and
    # take more registers for them than for the loop that nearly all rows need alone.
    step = 1 + (inputs.v_end >> 31)
    best = zero + float("-inf")
    for i in range(0, tiles, step):
        v = v_start + i * BLOCK_V
        best = tl.maximum(best, lane_max(by_lane(masked_logits(inputs, v, offs, curve, ACC, TILE, OPTIONS), TILE)))
    largest = row_max(best, TILE)
    c, far = shift_of(largest, curve)
    height, _ = row_curve(curve, far)
    s, r, mass, d = zero, zero, zero, zero
    for i in range(0, tiles, step):
        v = v_start + i * BLOCK_V
        u = masked_logits(inputs, v, offs, curve, ACC, TILE, OPTIONS)
        z = exponent(u, height, c)
        e = tl.exp2(z)
        s += lane_sum(by_lane(e, TILE))
        if OPTIONS.HAS_STATS:
            d += lane_sum(by_lane(e * tl.maximum(z, -200.0), TILE))
        if OPTIONS.HAS_SOFT:
            q = soft_target(inputs, v, offs, options, ACC, TILE, False)
            r += lane_sum(by_lane(weighted(q, exponent(u, height * 0.25, c * 0.25)), TILE))
            mass += lane_sum(by_lane(tl.where(u == u, q, 0.0), TILE))
    s = row_sum(s, TILE)
    r, mass, d = row_sum(r, TILE), row_sum(mass, TILE), row_sum(d, TILE)
    return c, s, r, mass, d, far


@triton.jit
def masked_logits(inputs, v, offs, curve, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr):
    """`used_logits` of a tile, -inf beyond the last class."""
    x = load_tile(inputs.x, v, offs, inputs.stride_xv, inputs.keep, inputs.v_end, float("-inf"), TILE, False, "")
    u, _ = used_logits(x, curve, ACC, OPTIONS)
    return tl.where(offs < inputs.v_end - v, u, float("-inf"))


@triton.jit
def target_weight(weight_ptr, local, own, ACC: tl.constexpr):
    """The class weight of an index target; 0 where it is not `own`, among the classes that this program has."""
    w = tl.where(own, 1.0, 0.0).to(ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + local, mask=own, other=0.0).to(ACC)
    return w


@triton.jit
def cross_entropy(s, r, mass, far, nats):
    """`ln2 (mass log2 s - r)` as the logarithm of a quotient, so that a target of probability 1 costs exactly 0.

    `r` is a quarter of it. In far rows its unit is `nats`, and not ln2.
    """
    mean = 4.0 * (tl.div_rn(r, mass) if r.dtype == tl.float32 else r / mass)
    power = tl.exp2(mean)
    quotient = tl.div_rn(s, power) if s.dtype == tl.float32 else s / power
    log_s = tl.log2(s) * tl.where(far, LN2 / nats, 1.0)
    # The comparison is false for NaN too, which rows without mass or with infinite logits have.
    near = (tl.abs(mean) < 100.0) & (far == 0)
    return tl.where(near, LN2 * mass * tl.log2(quotient), 4.0 * nats * (0.25 * mass * log_s - r))


@triton.jit
def store_row(rows_out, row, N, inside, loss, lse, c, s, mass, predicted, entropy):
    """Stores the results of rows into `Rows`."""
    tl.store(rows_out.loss + row, loss, mask=inside)
    if rows_out.lse is not None:
        tl.store(rows_out.lse + row, lse, mask=inside)
    tl.store(rows_out.norm + row, c, mask=inside)
    tl.store(rows_out.norm + N + row, s, mask=inside)
    tl.store(rows_out.norm + 2 * N + row, mass, mask=inside)
    if rows_out.entropy is not None:
        tl.store(rows_out.predicted + row, predicted, mask=inside)
        tl.store(rows_out.entropy + row, entropy, mask=inside)


@triton.jit
def store_ignored(rows_out, row, N, inside):
    """Stores the results of ignored rows, which are zeros."""
    store_row(rows_out, row, N, inside, loss=0.0, lse=0.0, c=0.0, s=0.0, mass=0.0, predicted=0, entropy=0.0)


@triton.jit
def store_kept(rows_out, row, N, inside, keep, sums, curve):
    """Stores the results of rows from their sums (`RowSums`), and zeros for ignored rows; returns (loss, lse)."""
    s = tl.where(keep, sums.s, 1.0)
    log_s = tl.log2(s)
    _, nats = row_curve(curve, sums.far)
    loss = tl.where(keep, cross_entropy(s, sums.r, sums.mass, sums.far, nats), 0.0)
    lse = tl.where(keep, fused_multiply_add(sums.c, nats, log_s * LN2), 0.0)
    entropy = tl.where(keep, LN2 * (log_s - sums.d / s), 0.0)
    c, s, mass = tl.where(keep, sums.c, 0.0), tl.where(keep, signed(s, sums.far), 0.0), tl.where(keep, sums.mass, 0.0)
    store_row(rows_out, row, N, inside, loss, lse, c, s, mass, tl.where(keep, sums.predicted, 0), entropy)
    return loss, lse


@triton.jit
def signed(s, far):
    """`s` as it is stored for backward: its sign says whether the row is far."""
    return tl.where(far, -s, s)


@triton.jit
def store_part(part_out, at, keep, sums, HAS_STATS: tl.constexpr):
    """Stores the sums (`RowSums`) over a part of each kept row into `Part`.

    The shift is not stored: it follows from the largest used logit, which is stored, as the argmax is chosen by it.
    """
    partial, field = part_out.partial + at, part_out.stride_field
    tl.store(partial, sums.largest, mask=keep)
    tl.store(partial + field, sums.s, mask=keep)
    tl.store(partial + 2 * field, sums.r, mask=keep)
    tl.store(partial + 3 * field, sums.mass, mask=keep)
    if HAS_STATS:
        tl.store(partial + 4 * field, sums.d, mask=keep)
        tl.store(part_out.argmax + at, sums.predicted, mask=keep)
