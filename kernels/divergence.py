"""The divergence of two rows of logits and its gradient, tile by tile.

With p and q the distributions of teacher and student at the temperature, in bits:

    forward_kl = sum p (log2 p - log2 q)    reverse_kl = sum q (log2 q - log2 p)
    jsd = beta sum p (log2 p - log2 m) + (1 - beta) sum q (log2 q - log2 m),    m = beta p + (1 - beta) q

With exponents z = y - c and sums s of powers as in `sums.py`, log2 p = z_p - log2 s_p. A Kullback-Leibler divergence is
therefore known after one walk over both rows: it is `sum p (z_p - z_q) + log2(s_q / s_p)`. In the other one, m couples
both distributions at every class, so that their sums have to be known first: it takes a second walk. The gradients with
respect to the student's used logits at the temperature are

    forward_kl: q - p        reverse_kl: ln2 q (z_q - z_p - mean),    mean = sum q (z_q - z_p)
    jsd: ln2 (1 - beta) q (log2 q - log2 m - mean),    mean = sum q (log2 q - log2 m)

so that backward, to which forward gives `mean`, reads both rows once. A class of probability 0 contributes 0. Where the
first walk's sums are not finite, rows are walked again with care.
"""

import triton
import triton.language as tl

from .device_math import (
    LN2,
    by_lane,
    exponent,
    fused_multiply_add,
    lane_max,
    lane_sum,
    lowest,
    row_curve,
    row_max,
    row_sum,
    used_logits,
)
from .distillation_structs import Logarithm, Normaliser, PairLanes
from .sums import careful_sums, first_of_largest
from .tiles import load_tile, tile_offsets


@triton.jit
def used_tile(
    side, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, WHOLE: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """`used_logits` of a tile, -inf beyond the last class."""
    inputs = side.inputs
    x = load_tile(inputs.x, v, offs, inputs.stride_xv, inputs.keep, inputs.v_end, float("-inf"), TILE, WHOLE, EVICT)
    u, slope = used_logits(x, side.options.curve, ACC, OPTIONS)
    if (OPTIONS.HAS_SCALE or OPTIONS.HAS_SOFTCAP) and not WHOLE:
        u = tl.where(offs < inputs.v_end - v, u, float("-inf"))
    return u, slope


@triton.jit
def weighted_difference(weight, x, y):
    """`weight * (x - y)`, and 0 for a weight of 0: a class of probability 0 contributes nothing."""
    return tl.where(weight == 0.0, 0.0, weight * (x - y))


@triton.jit
def add_pair(
    lanes, student, teacher, height, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    TEACHER: tl.constexpr, MIX: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The lanes' sums (`PairLanes`) with the tile that starts at class `v` added; `height` is at temperature 1."""
    u, _ = used_tile(student, v, offs, ACC, TILE, OPTIONS, WHOLE, EVICT)
    w, _ = used_tile(teacher, v, offs, ACC, TILE, TEACHER, WHOLE, EVICT)
    u, w = by_lane(u, TILE), by_lane(w, TILE)
    height_q, height_p = student.options.curve.height, teacher.options.curve.height
    largest = lane_max(u)
    c_q = tl.maximum(lanes.c_q, tl.floor(largest * height_q))
    c_p = tl.maximum(lanes.c_p, tl.floor(lane_max(w) * height_p))
    z_q, z_p = exponent(u, height_q, c_q), exponent(w, height_p, c_p)
    e_q, e_p = tl.exp2(z_q), tl.exp2(z_p)
    down_q, down_p = lanes.c_q - c_q, lanes.c_p - c_p
    power_q, power_p = tl.exp2(down_q), tl.exp2(down_p)
    kl, c, s, d, best, at = lanes.kl, lanes.c, lanes.s, lanes.d, lanes.best, lanes.at
    if MIX.KIND == "forward_kl":
        kl = power_p * (kl + lanes.s_p * (down_p - down_q)) + lane_sum(weighted_difference(e_p, z_p, z_q))
    if MIX.KIND == "reverse_kl":
        kl = power_q * (kl + lanes.s_q * (down_q - down_p)) + lane_sum(weighted_difference(e_q, z_q, z_p))
    if OPTIONS.HAS_STATS:
        at = tl.where(largest > best, v, at)
        best = tl.maximum(best, largest)
    if MIX.APART:
        c = tl.maximum(lanes.c, tl.floor(largest * height))
        z, down = exponent(u, height, c), lanes.c - c
        e, power = tl.exp2(z), tl.exp2(down)
        s = lanes.s * power + lane_sum(e)
    else:
        z, e, down, power = z_q, e_q, down_q, power_q
        s = lanes.s_q
    if OPTIONS.HAS_STATS:
        before = lanes.s if MIX.APART else lanes.s_q
        d = power * (d + before * down) + lane_sum(e * tl.maximum(z, -200.0))
    s_q, s_p = lanes.s_q * power_q + lane_sum(e_q), lanes.s_p * power_p + lane_sum(e_p)
    return PairLanes(c_q=c_q, s_q=s_q, c_p=c_p, s_p=s_p, kl=kl, c=c, s=s, d=d, best=best, at=at)


@triton.jit
def sound(c, s):
    """Whether a sum of powers can be relied on: nothing overflowed, and nothing was NaN. Else it is computed again."""
    return (s > 2.0**-100) & (s < 2.0**100) & (tl.abs(c) < -lowest(c))


@triton.jit
def pair_sums(
    student, teacher, ones, offs, beta, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    TEACHER: tl.constexpr, MIX: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The normalisers of q, p and the student at temperature 1; the divergence and `mean` in bits; d; predicted.

    `ones` is the student's side at temperature 1.
    """
    LANES: tl.constexpr = TILE.LANES
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    v_end, height = student.inputs.v_end, ones.options.curve.height
    zero = tl.zeros((1, 1, LANES, 1), ACC)
    low = zero + lowest(zero)
    lanes = PairLanes(
        c_q=low, s_q=zero, c_p=low, s_p=zero, kl=zero, c=low, s=zero, d=zero, best=zero + float("-inf"),
        at=tl.zeros((1, 1, LANES, 1), tl.int32),
    )  # fmt: skip
    whole_end = v_end // BLOCK_V * BLOCK_V
    for v in range(0, whole_end, BLOCK_V):
        lanes = add_pair(lanes, student, teacher, height, v, offs, ACC, TILE, OPTIONS, TEACHER, MIX, True, EVICT)
    if whole_end < v_end:
        lanes = add_pair(
            lanes, student, teacher, height, whole_end, offs, ACC, TILE, OPTIONS, TEACHER, MIX, False, EVICT
        )

    c_q, c_p, c = row_max(lanes.c_q, TILE), row_max(lanes.c_p, TILE), row_max(lanes.c, TILE)
    down_q, down_p, down = lanes.c_q - c_q, lanes.c_p - c_p, lanes.c - c
    power_q, power_p, power = tl.exp2(down_q), tl.exp2(down_p), tl.exp2(down)
    s_q, s_p, s = row_sum(lanes.s_q * power_q, TILE), row_sum(lanes.s_p * power_p, TILE), row_sum(lanes.s * power, TILE)
    mean, d, predicted = s_q * 0.0, s_q * 0.0, 0
    if MIX.KIND == "forward_kl":
        kl = row_sum(power_p * (lanes.kl + lanes.s_p * (down_p - down_q)), TILE)
        mean = kl / s_p
    if MIX.KIND == "reverse_kl":
        kl = row_sum(power_q * (lanes.kl + lanes.s_q * (down_q - down_p)), TILE)
        mean = kl / s_q
    if OPTIONS.HAS_STATS:
        if MIX.APART:
            d = row_sum(power * (lanes.d + lanes.s * down), TILE)
        else:
            d = row_sum(power_q * (lanes.d + lanes.s_q * down_q), TILE)
        predicted = first_of_largest(
            lanes, student.inputs, 0, offs, student.options.curve, row_max(lanes.best, TILE), ACC, TILE, OPTIONS
        )
    far_q = s_q < 0.0
    far_p, far = far_q, far_q
    fine = sound(c_q, s_q) & sound(c_p, s_p) & (tl.abs(mean) < float("inf"))
    if MIX.APART:
        fine &= sound(c, s)
    if fine == 0:
        one = tile_offsets(TILE, 1)  # chunk, which takes the fewest registers
        c_q, s_q, _, _, d_q, far_q = careful_sums(student.inputs, 0, one, zero, student.options, ACC, TILE, OPTIONS)
        c_p, s_p, _, _, _, far_p = careful_sums(teacher.inputs, 0, one, zero, teacher.options, ACC, TILE, TEACHER)
        if MIX.APART:
            c, s, _, _, d_q, far = careful_sums(ones.inputs, 0, one, zero, ones.options, ACC, TILE, OPTIONS)
        if OPTIONS.HAS_STATS:
            d = d_q
    q, p = Normaliser(c=c_q, s=s_q, far=far_q), Normaliser(c=c_p, s=s_p, far=far_p)
    if MIX.KIND == "jsd":
        mean_p, mean = walked(student, teacher, q, p, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, EVICT)
        bits = beta * mean_p + (1.0 - beta) * mean
        mean = tl.where(bits == bits, mean, bits)  # a teacher's NaN would not reach the gradient otherwise
    else:
        if fine == 0:
            mean_p, mean_q = walked(student, teacher, q, p, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, EVICT)
            mean = mean_p + mean_q
        bits = mean + tl.log2(s_q / s_p if MIX.KIND == "forward_kl" else s_p / s_q)
    normaliser = Normaliser(c=c, s=s, far=far) if MIX.APART else q
    return q, p, normaliser, bits, mean, d, predicted


@triton.jit
def logarithm_of(side, sums):
    """The `Logarithm` of a distribution in this row."""
    height, nats = row_curve(side.options.curve, sums.far)
    unit = tl.where(sums.far, nats / LN2, 1.0)
    return Logarithm(height=height, c=sums.c, unit=unit, log_s=tl.log2(sums.s))


@triton.jit
def quarter(u, terms):
    """A quarter of the exponent of each class, in bits: finite for finite logits."""
    return exponent(u, 0.25 * terms.height, 0.25 * terms.c) * terms.unit


@triton.jit
def log_probability(u, terms):
    """log2 of the probability of each class."""
    return fused_multiply_add(exponent(u, terms.height, terms.c), terms.unit, -terms.log_s)


@triton.jit
def log2_of(m):
    """log2 of a finite number that is at least 0, to 7e-8 absolute, in half the instructions of `tl.log2`; -127 of 0.

    With a power of two taken out, 1 + f lies in [2/3, 4/3], where log2(1 + f) / f is a polynomial (fitted for the least
    absolute error).
    """
    if m.dtype == tl.float64:
        return tl.maximum(tl.log2(m), -1100.0)
    else:
        bits = m.to(tl.int32, bitcast=True)
        power = (bits - 0x3F2AAAAB) & -0x800000
        f = (bits - power).to(tl.float32, bitcast=True) - 1.0
        poly = 0.21228638291358948 * f - 0.22616688907146454
        poly = poly * f + 0.19948260486125946
        poly = poly * f - 0.2359427660703659
        poly = poly * f + 0.2888970375061035
        poly = poly * f - 0.36084407567977905
        poly = poly * f + 0.4808906316757202
        poly = poly * f - 0.7213455438613892
        poly = poly * f + 1.442695140838623
        return power.to(tl.float32) * 2.0**-23 + poly * f


@triton.jit
def with_mean(log_p, log_q, beta):
    """(p, q, log2 p, log2 q, log2 m). Logarithms of 0 are made finite, since 0 * inf would be NaN."""
    p, q = tl.exp2(log_p), tl.exp2(log_q)
    log_m = log2_of(fused_multiply_add(p, beta, q * (1.0 - beta)))
    return p, q, tl.maximum(log_p, -2000.0), tl.maximum(log_q, -2000.0), log_m


@triton.jit
def add_difference(
    sum_p, sum_q, student, teacher, of_q, of_p, v, offs, beta, ACC: tl.constexpr, TILE: tl.constexpr,
    OPTIONS: tl.constexpr, TEACHER: tl.constexpr, MIX: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The lanes' sums of what p and q are the weights of, with the tile at class `v` added; see `walked`."""
    u, _ = used_tile(student, v, offs, ACC, TILE, OPTIONS, WHOLE, EVICT)
    w, _ = used_tile(teacher, v, offs, ACC, TILE, TEACHER, WHOLE, EVICT)
    log_q, log_p = log_probability(u, of_q), log_probability(w, of_p)
    if MIX.KIND == "forward_kl":
        difference = weighted_difference(tl.exp2(log_p), quarter(w, of_p), quarter(u, of_q))
        sum_p += lane_sum(by_lane(difference, TILE))
    if MIX.KIND == "reverse_kl":
        difference = weighted_difference(tl.exp2(log_q), quarter(u, of_q), quarter(w, of_p))
        sum_q += lane_sum(by_lane(difference, TILE))
    if MIX.KIND == "jsd":
        p, q, log_p, log_q, log_m = with_mean(log_p, log_q, beta)
        sum_p += lane_sum(by_lane(p * (log_p - log_m), TILE))
        sum_q += lane_sum(by_lane(q * (log_q - log_m), TILE))
    return sum_p, sum_q


@triton.jit
def walked(
    student, teacher, q, p, offs, beta, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    TEACHER: tl.constexpr, MIX: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The sums weighted by p and by q, in bits, by a walk backwards: what was read last is still in the cache.

    They are of log2 p - log2 m and log2 q - log2 m, or of the difference of exponents, which is summed in quarters.
    """
    LANES: tl.constexpr = TILE.LANES
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    v_end = student.inputs.v_end
    of_q, of_p = logarithm_of(student, q), logarithm_of(teacher, p)
    sum_p = tl.zeros((1, 1, LANES, 1), ACC)
    sum_q = sum_p
    tail = v_end // BLOCK_V * BLOCK_V
    if MIX.KIND != "jsd":  # it is rare that such a divergence is walked for, and a loop with a mask alone is short
        for up in range(0, v_end, BLOCK_V):
            v = (v_end - 1) // BLOCK_V * BLOCK_V - up
            sum_p, sum_q = add_difference(
                sum_p, sum_q, student, teacher, of_q, of_p, v, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, False,
                EVICT,
            )  # fmt: skip
        tail = 0
    elif tail < v_end:
        sum_p, sum_q = add_difference(
            sum_p, sum_q, student, teacher, of_q, of_p, tail, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, False, EVICT
        )
    for up in range(0, tail, BLOCK_V):
        v = tl.multiple_of(tail - BLOCK_V - up, BLOCK_V)
        sum_p, sum_q = add_difference(
            sum_p, sum_q, student, teacher, of_q, of_p, v, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, True, EVICT
        )
    sum_p, sum_q = row_sum(sum_p, TILE), row_sum(sum_q, TILE)
    if MIX.KIND != "jsd":
        sum_p, sum_q = sum_p * 4.0, sum_q * 4.0
    return sum_p, sum_q
