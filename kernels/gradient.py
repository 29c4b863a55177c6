"""A row's gradient, tile by tile.

With p = 2^(y - c) / s and log p in nats, and g, dlse and dentropy the gradients of the row's loss, lse and entropy:

    dx     = (g (mass p - q) + dlse p - dentropy p (log p + entropy)) * slope
    dprobs = -g (1 - smoothing) weight log p

All that multiplies 2^(y - c) is one number a row, so that most logits cost one multiplication. Where p is near the
target's q, `mass 2^(y - c) - q s` is taken first: it is exact there, and a product with 1 / s would not be.
"""

import triton
import triton.language as tl

from .device_math import LN2, exponent, used_logits
from .sums import soft_target
from .tiles import load_tile, load_weights, store_tile


@triton.jit
def upstream_of(upstream, strides, row, keep, ACC: tl.constexpr):
    """(g, dlse, dentropy) of each kept row; the last two are None where there are none.

    `upstream` is pointers to dloss, factor (a scalar), token weight, dlse and dentropy; all but the first may be None.
    """
    dloss_ptr, factor_ptr, token_weight_ptr, dlse_ptr, dentropy_ptr = upstream
    g = tl.load(dloss_ptr + row * strides[0], mask=keep, other=0.0).to(ACC)
    if factor_ptr is not None:
        g *= tl.load(factor_ptr).to(ACC)
    if token_weight_ptr is not None:
        g *= tl.load(token_weight_ptr + row * strides[2], mask=keep, other=0.0).to(ACC)
    if dlse_ptr is None:
        dlse: tl.constexpr = None
    else:
        dlse = tl.load(dlse_ptr + row * strides[3], mask=keep, other=0.0).to(ACC)
    if dentropy_ptr is None:
        dentropy: tl.constexpr = None
    else:
        dentropy = tl.load(dentropy_ptr + row * strides[4], mask=keep, other=0.0).to(ACC)
    return g, dlse, dentropy


@triton.jit
def row_terms(g, dlse, dentropy, c, s, mass, entropy, q_target, local, hard, steep, HAS_DPROBS: tl.constexpr):
    """What the tiles of a row need to know of it.

    A row whose logits are all -inf has s = 0, and no gradient.
    """
    inverse = tl.where(s == 0, 0.0, 1.0 / s)
    log_s = tl.log2(s)
    if HAS_DPROBS:
        of_probs = (g * hard * LN2, log_s)
    else:
        of_probs: tl.constexpr = None
    g *= steep
    of_lse = g * 0.0
    if dlse is not None:
        of_lse = dlse * steep * inverse
    if dentropy is None:
        of_entropy: tl.constexpr = None
    else:
        of_entropy = (dentropy * steep * inverse * LN2, entropy / LN2 - log_s)
    if local is None:
        target: tl.constexpr = None
    else:
        target = (local, q_target * s, mass, g * inverse, of_lse)
    return c, g * mass * inverse + of_lse, g, target, of_entropy, of_probs


@triton.jit
def gradient_tile(
    rows, out, v, offs, terms, weight_ptr, soft, curve, ACC: tl.constexpr, TILE: tl.constexpr,
    OPTIONS: tl.constexpr, WHOLE: tl.constexpr, TARGET: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Reads the tile that starts at class `v` and writes its gradients.

    `out` is (dx_row, stride_dxv, dprobs_row, stride_dpv, inside), where either row may be None.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    x_row, stride_xv, _, _, keep, v_end = rows
    dx_row, stride_dxv, dprobs_row, stride_dpv, inside = out
    c, multiplier, g, target, of_entropy, of_probs = terms
    x = load_tile(x_row, v, offs, stride_xv, keep, v_end, float("-inf"), BLOCK_N, WHOLE, IN)
    u, slope = used_logits(x, curve, ACC, OPTIONS)
    z = exponent(u, curve[1], c)
    if dx_row is not None:
        e = tl.exp2(z)
        grad = e * multiplier
        if soft is not None:
            q = soft_target(rows, v, offs, weight_ptr, soft, ACC, TILE, WHOLE)
            grad -= q * g
        if TARGET:
            local, qs, mass, g_s, of_lse = target
            grad = tl.where(offs == local - v, (e * mass - qs) * g_s + e * of_lse, grad)
        if of_entropy is not None:
            grad -= e * of_entropy[0] * (tl.maximum(z, -200.0) + of_entropy[1])
        if OPTIONS[2]:
            grad *= slope
        # A class of logit -inf has e = 0, and 0 it stays, but for its soft target.
        if soft is not None:
            grad = tl.where(u != float("-inf"), grad, 0.0)
        # Selected, not multiplied by 0: an ignored row gets 0 under any upstream gradient.
        if BLOCK_N > 1:
            grad = tl.where(keep, grad, 0.0)
        store_tile(dx_row, v, offs, stride_dxv, inside, v_end, grad, BLOCK_N, WHOLE, OUT)
    if dprobs_row is not None:
        grad = of_probs[0] * (of_probs[1] - z)
        if weight_ptr is not None:
            grad *= load_weights(weight_ptr, v, offs, v_end, TILE[0], TILE[3]).to(ACC)
        if BLOCK_N > 1:
            grad = tl.where(keep, grad, 0.0)
        store_tile(dprobs_row, v, offs, stride_dpv, inside, v_end, grad, BLOCK_N, WHOLE, OUT)


@triton.jit
def write_gradient(
    rows, out, v_start, offs, terms, weight_ptr, soft, curve, ACC: tl.constexpr, TILE: tl.constexpr,
    OPTIONS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """The gradients of the kept rows' classes from `v_start` on, last tile first; zeros for other rows.

    What was read last is read again first: it is what the cache still has.
    """
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    v_end = rows[5]
    HAS_TARGET: tl.constexpr = terms[3] is not None
    v_target = v_start - 1
    if HAS_TARGET and TILE[0] == 1:
        # The tile that has the target: one of the other tiles' many logits must not pay for it.
        distance = terms[3][0] - v_start
        if (distance >= 0) & (distance < v_end - v_start):
            v_target = v_start + distance.to(tl.int32) // BLOCK_V * BLOCK_V
            gradient_tile(
                rows, out, v_target, offs, terms, weight_ptr, soft, curve, ACC, TILE, OPTIONS, False, True, IN, OUT
            )
    if TILE[0] == 1:
        whole = (v_end - v_start) // BLOCK_V
        tail = v_start + whole * BLOCK_V
        if (tail < v_end) & (tail != v_target):
            gradient_tile(
                rows, out, tail, offs, terms, weight_ptr, soft, curve, ACC, TILE, OPTIONS, False, False, IN, OUT
            )
        for i in range(1, whole + 1):
            v = tail - i * BLOCK_V
            if v != v_target:
                gradient_tile(
                    rows, out, v, offs, terms, weight_ptr, soft, curve, ACC, TILE, OPTIONS, True, False, IN, OUT
                )
    else:
        for v in range(v_start, v_end, BLOCK_V):
            gradient_tile(
                rows, out, v, offs, terms, weight_ptr, soft, curve, ACC, TILE, OPTIONS, False, HAS_TARGET, IN, OUT
            )


@triton.jit
def write_zeros(start, stride_v, v_start, v_end, offs, BLOCK_V: tl.constexpr):
    """Over the classes of one row."""
    for v in range(v_start, v_end, BLOCK_V):
        store_tile(start, v, offs, stride_v, True, v_end, tl.zeros(offs.shape, tl.float32), 1, False)
