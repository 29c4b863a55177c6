"""The gradient of a divergence, and of a cross entropy beside it, tile by tile; the formulas are in `divergence.py`."""

import triton
import triton.language as tl

from .device_math import LN2, exponent, row_curve
from .distillation_structs import PairTerms
from .divergence import log_probability, logarithm_of, quarter, used_tile, weighted_difference, with_mean
from .tiles import store_tile


@triton.jit
def pair_gradient_tile(
    student, teacher, terms, dx, stride_dxv, v, offs, beta, ACC: tl.constexpr, TILE: tl.constexpr,
    OPTIONS: tl.constexpr, TEACHER: tl.constexpr, MIX: tl.constexpr, WHOLE: tl.constexpr, TARGET: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Reads the tile of both sides that starts at class `v` and writes its gradient, from `terms` (`PairTerms`)."""
    u, slope = used_tile(student, v, offs, ACC, TILE, OPTIONS, WHOLE, EVICT)
    w, _ = used_tile(teacher, v, offs, ACC, TILE, TEACHER, WHOLE, EVICT)
    e_q = tl.exp2(exponent(u, terms.height_q, terms.c_q))
    if MIX.KIND == "forward_kl":
        grad = e_q * terms.g_q - tl.exp2(exponent(w, terms.height_p, terms.c_p)) * terms.g_p
    else:
        if MIX.KIND == "reverse_kl":
            difference = quarter(u, terms.log_q) - quarter(w, terms.log_p)
            grad = weighted_difference(e_q * terms.g_q, difference, terms.mean)
        else:
            log_q, log_p = log_probability(u, terms.log_q), log_probability(w, terms.log_p)
            _, q, _, log_q, log_m = with_mean(log_p, log_q, beta)
            grad = q * terms.g_q * ((log_q - log_m) - terms.mean)
    if MIX.HARD:
        e = e_q
        if MIX.APART:
            e = tl.exp2(exponent(u, terms.height, terms.c))
        hard = e * terms.g_hard
        if TARGET:  # the difference is exact where the target's probability is near 1; a logit of -inf has no gradient
            hard = tl.where(offs == terms.target - v, (e - terms.s) * terms.g_hard, hard)
            hard = tl.where(u != float("-inf"), hard, 0.0)
        grad += hard
    if MIX.ONE_CLASS:  # 0, but NaN for a logit of NaN
        grad *= 0.0
    if OPTIONS.HAS_SOFTCAP:
        grad *= slope
    store_tile(dx, v, offs, stride_dxv, True, student.inputs.v_end, grad, TILE, WHOLE, EVICT)


@triton.jit
def write_pair_gradient(
    student, teacher, ones, row, upstream, v_start, dx, stride_dxv, target, offs, beta, share, hard,
    ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, TEACHER: tl.constexpr, MIX: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the classes from `v_start` on, from what is known of a row (`KnownRow`), backwards."""
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    v_end = student.inputs.v_end
    height_q, _ = row_curve(student.options.curve, row.q.far)
    height_p, _ = row_curve(teacher.options.curve, row.p.far)
    height, _ = row_curve(ones.options.curve, row.ones.far)
    g = upstream * share * student.options.curve.steep
    g_q = g / row.q.s
    mean = row.mean
    if MIX.KIND == "reverse_kl":  # the difference of exponents is in quarters
        g_q *= 4.0 * LN2
        mean *= 0.25
    if MIX.KIND == "jsd":
        g_q = g * (1.0 - beta) * LN2
    terms = PairTerms(
        height_q=height_q, c_q=row.q.c, height_p=height_p, c_p=row.p.c, height=height, c=row.ones.c, s=row.ones.s,
        g_q=g_q, g_p=g / row.p.s, g_hard=upstream * hard * ones.options.curve.steep / row.ones.s,
        mean=mean, log_q=logarithm_of(student, row.q), log_p=logarithm_of(teacher, row.p), target=target,
    )  # fmt: skip
    v_target = v_start - 1
    if MIX.HARD:
        distance = target - v_start
        if (distance >= 0) & (distance < v_end - v_start):
            v_target = v_start + distance.to(tl.int32) // BLOCK_V * BLOCK_V
            pair_gradient_tile(
                student, teacher, terms, dx, stride_dxv, v_target, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, False,
                True, EVICT,
            )  # fmt: skip
    tail = v_start + (v_end - v_start) // BLOCK_V * BLOCK_V
    if (tail < v_end) & (tail != v_target):
        pair_gradient_tile(
            student, teacher, terms, dx, stride_dxv, tail, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, False, False,
            EVICT,
        )  # fmt: skip
    for up in range(v_start, tail, BLOCK_V):
        v = tl.multiple_of(v_start + tail - BLOCK_V - up, BLOCK_V)
        if v != v_target:
            pair_gradient_tile(
                student, teacher, terms, dx, stride_dxv, v, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, True, False,
                EVICT,
            )  # fmt: skip
