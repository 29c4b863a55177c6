"""A row's gradient, tile by tile.

With p = 2^(y - c) / s and log p in nats, and g, dlse and dentropy the gradients of the row's loss, lse and entropy:

    dx     = (g (mass p - q) + dlse p - dentropy p (log p + entropy)) * slope
    dprobs = -g (1 - smoothing) weight log p

All factors of 2^(y - c) are combined into one number per row, so that most logits cost one multiplication. For the
target's logit, `mass 2^(y - c) - q s` is computed before the product with 1 / s: where p is near q, this difference is
exact, and a difference of rounded products would not be.
"""

import triton
import triton.language as tl

from .device_math import LN2, exponent, used_logits
from .sums import soft_target
from .tiles import load_tile, load_weights, store_tile


@triton.jit
def load_upstream(ptr, stride, row, keep, ACC: tl.constexpr):
    """Loads an upstream gradient of each kept row."""
    return tl.load(ptr + row * stride, mask=keep, other=0.0).to(ACC)


@triton.jit
def loss_gradient(upstream, strides, row, keep, ACC: tl.constexpr):
    """The upstream gradient of each kept row's loss.

    `upstream` points to dloss, factor (a scalar), token weight, dlse and dentropy; all but the first may be None.
    """
    g = load_upstream(upstream[0], strides[0], row, keep, ACC)
    if upstream[1] is not None:
        g *= tl.load(upstream[1]).to(ACC)
    if upstream[2] is not None:
        g *= load_upstream(upstream[2], strides[2], row, keep, ACC)
    return g


@triton.jit
def row_terms(g, dlse, dentropy, c, s, mass, entropy, w_target, local, soft, steep):
    """The numbers per row that `gradient_tile` needs: (c, multiplier of 2^(y - c), g, target, of_entropy, of_probs).

    `target` has the numbers for the target's logit, `of_entropy` and `of_probs` have those for the gradients of the
    entropy and of probabilities. A row whose logits are all -inf has s = 0, and no gradient.
    """
    inverse = tl.where(s == 0, 0.0, 1.0 / s)
    log_s = tl.log2(s)
    of_probs = (g * soft[0] * LN2, log_s)
    g *= steep
    of_lse = dlse * steep * inverse
    of_entropy = (dentropy * steep * inverse * LN2, entropy / LN2 - log_s)
    target = (local, w_target * (soft[0] + soft[1]) * s, mass, g * inverse, of_lse)
    return c, g * mass * inverse + of_lse, g, target, of_entropy, of_probs


@triton.jit
def gradient_tile(
    row, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    WHOLE: tl.constexpr, TARGET: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Reads the tile that starts at class `v` and writes its gradients.

    `row` is (rows, out, terms, loss): rows and loss as `row_sums` takes them, terms as `row_terms` returns them, and
    `out` is (dx_row, stride_dxv, dprobs_row, stride_dpv, inside), where either row may be None.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    rows, out, terms, loss = row
    weight_ptr, soft, curve = loss
    x_row, stride_xv, _, _, keep, v_end = rows
    dx_row, stride_dxv, dprobs_row, stride_dpv, inside = out
    c, multiplier, g, target, of_entropy, of_probs = terms
    x = load_tile(x_row, v, offs, stride_xv, keep, v_end, float("-inf"), BLOCK_N, WHOLE, IN)
    u, slope = used_logits(x, curve, ACC, OPTIONS)
    z = exponent(u, curve[1], c)
    if dx_row is not None:
        e = tl.exp2(z)
        grad = e * multiplier
        if OPTIONS[0]:
            q = soft_target(rows, v, offs, weight_ptr, soft, ACC, TILE, WHOLE)
            grad -= q * g
        if TARGET:
            local, qs, mass, g_s, of_lse = target
            grad = tl.where(offs == local - v, (e * mass - qs) * g_s + e * of_lse, grad)
        if HAS_ENTROPY:
            grad -= e * of_entropy[0] * (tl.maximum(z, -200.0) + of_entropy[1])
        if OPTIONS[2]:
            grad *= slope
        # A logit of -inf has e = 0, and its gradient is 0 whatever its weight in the target.
        if OPTIONS[0] or TARGET:
            grad = tl.where(u != float("-inf"), grad, 0.0)
        # Selected, not multiplied by 0: an ignored row gets 0 even where the upstream gradient is NaN.
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
    row, v_start, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the classes from `v_start` on; among several rows, those not kept get zeros.

    A single row is walked backwards, since what was read last is still in the cache.
    """
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    rows, _, terms, _ = row
    v_end = rows[5]
    HAS_TARGET: tl.constexpr = rows[2] is None  # targets are indices unless they are probabilities
    v_target = v_start - 1
    if HAS_TARGET and TILE[0] == 1:
        # The target's tile is computed apart, so that the logits of all other tiles do not pay for its terms.
        distance = terms[3][0] - v_start
        if (distance >= 0) & (distance < v_end - v_start):
            v_target = v_start + distance.to(tl.int32) // BLOCK_V * BLOCK_V
            gradient_tile(row, v_target, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, False, True, IN, OUT)
    if TILE[0] == 1:
        tail = v_start + (v_end - v_start) // BLOCK_V * BLOCK_V
        if (tail < v_end) & (tail != v_target):
            gradient_tile(row, tail, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, False, False, IN, OUT)
        for up in range(v_start, tail, BLOCK_V):
            # Triton 3.6 does not see that a difference of multiples is a multiple.
            v = tl.multiple_of(v_start + tail - BLOCK_V - up, BLOCK_V)
            if v != v_target:
                gradient_tile(row, v, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, True, False, IN, OUT)
    else:
        for v in range(v_start, v_end, BLOCK_V):
            gradient_tile(row, v, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, False, HAS_TARGET, IN, OUT)


@triton.jit
def write_zeros(start, stride_v, v_start, v_end, offs, BLOCK_V: tl.constexpr):
    """Writes zeros over the classes of one row."""
    for v in range(v_start, v_end, BLOCK_V):
        store_tile(start, v, offs, stride_v, True, v_end, tl.zeros(offs.shape, tl.float32), 1, False, "")
