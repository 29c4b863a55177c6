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

from .device_math import LN2, exponent, row_curve, used_logits
from .structs import ExponentTerms, TargetTerms, Terms
from .sums import soft_target
from .tiles import load_tile, load_weights, store_tile


@triton.jit
def load_upstream(ptr, stride, row, keep, ACC: tl.constexpr):
    """Loads an upstream gradient of each kept row."""
    return tl.load(ptr + row * stride, mask=keep, other=0.0).to(ACC)


@triton.jit
def loss_gradient(upstream, strides, row, keep, ACC: tl.constexpr):
    """The upstream gradient of each kept row's loss: dloss, times its factors if there are any."""
    g = load_upstream(upstream.dloss, strides.dloss, row, keep, ACC)
    if upstream.factor is not None:
        g *= tl.load(upstream.factor).to(ACC)
    if upstream.token_weight is not None:
        g *= load_upstream(upstream.token_weight, strides.token_weight, row, keep, ACC)
    return g


@triton.jit
def row_terms(g, dlse, dentropy, c, s, mass, entropy, w_target, local, options):
    """The numbers per row (`Terms`) that `gradient_tile` needs, with s as `signed` gives it.

    A row whose logits are all -inf has s = 0, and no gradient.
    """
    confidence, steep = options.smoothing.confidence, options.curve.steep
    far, s = s < 0, tl.abs(s)
    height, nats = row_curve(options.curve, far)
    inverse = tl.where(s == 0, 0.0, 1.0 / s)
    log_s = tl.log2(s) * tl.where(far, LN2 / nats, 1.0)
    dlog_p = g * confidence * nats
    of_probs = ExponentTerms(multiplier=4.0 * dlog_p, offset=dlog_p * log_s)
    g *= steep
    of_lse = dlse * steep * inverse
    of_entropy = ExponentTerms(multiplier=dentropy * steep * inverse * nats, offset=entropy / nats - log_s)
    q_s = w_target * (confidence + options.smoothing.share) * s
    of_target = TargetTerms(local=local, q_s=q_s, mass=mass, g_s=g * inverse, of_lse=of_lse)
    multiplier = g * mass * inverse + of_lse
    return Terms(c=c, height=height, multiplier=multiplier, g=g, target=of_target, entropy=of_entropy, probs=of_probs)


@triton.jit
def logit_gradient(
    rows, u, slope, z, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, WHOLE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits of a tile that starts at class `v`, from what `used_logits` and `exponent` return."""
    inputs, terms, options = rows.inputs, rows.terms, rows.options
    e = tl.exp2(z)
    if OPTIONS.ONE_CLASS:  # the loss does not depend on its logit; an upstream gradient of NaN is not hidden
        grad = e * terms.target.of_lse + terms.g * 0.0
    else:
        grad = e * terms.multiplier
        if OPTIONS.HAS_SOFT:
            q = soft_target(inputs, v, offs, options, ACC, TILE, WHOLE)
            grad -= q * terms.g
        if TARGET:
            target = terms.target
            grad = tl.where(
                offs == target.local - v, (e * target.mass - target.q_s) * target.g_s + e * target.of_lse, grad
            )
    if HAS_ENTROPY and not OPTIONS.ONE_CLASS:
        grad -= e * terms.entropy.multiplier * (tl.maximum(z, -200.0) + terms.entropy.offset)
    if OPTIONS.HAS_SOFTCAP:
        grad *= slope
    # A logit of -inf has e = 0, and its gradient is 0 whatever its weight in the target.
    if OPTIONS.HAS_SOFT or TARGET:
        grad = tl.where(u != float("-inf"), grad, 0.0)
    return grad


@triton.jit
def gradient_tile(
    rows, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    WHOLE: tl.constexpr, TARGET: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Reads the tile of `rows` (`GradientRows`) that starts at class `v` and writes its gradients."""
    inputs, outputs = rows.inputs, rows.outputs
    terms, options = rows.terms, rows.options
    x = load_tile(inputs.x, v, offs, inputs.stride_xv, inputs.keep, inputs.v_end, float("-inf"), TILE, WHOLE, IN)
    u, slope = used_logits(x, options.curve, ACC, OPTIONS)
    z = exponent(u, terms.height, terms.c)
    if outputs.dx is not None:
        grad = logit_gradient(rows, u, slope, z, v, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, WHOLE, TARGET)
        # Selected, not multiplied by 0: an ignored row gets 0 even where the upstream gradient is NaN.
        if TILE.BLOCK_N > 1:
            grad = tl.where(inputs.keep, grad, 0.0)
        store_tile(outputs.dx, v, offs, outputs.stride_dxv, outputs.inside, inputs.v_end, grad, TILE, WHOLE, OUT)
    if outputs.dprobs is not None:
        if OPTIONS.ONE_CLASS:  # 0, but NaN for a logit of NaN
            grad = terms.probs.multiplier * (z - z)
        else:  # a quarter of the exponent does not overflow
            grad = terms.probs.offset - terms.probs.multiplier * exponent(u, terms.height * 0.25, terms.c * 0.25)
        if inputs.weight is not None:
            grad *= load_weights(inputs.weight, v, offs, inputs.v_end, TILE, WHOLE).to(ACC)
        if TILE.BLOCK_N > 1:
            grad = tl.where(inputs.keep, grad, 0.0)
        store_tile(outputs.dprobs, v, offs, outputs.stride_dpv, outputs.inside, inputs.v_end, grad, TILE, WHOLE, OUT)


@triton.jit
def write_gradient(
    rows, v_start, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the classes of `rows` (`GradientRows`) from `v_start` on.

    Among several rows, those not kept get zeros. A single row is walked backwards, since what was read last is still
    in the cache.
    """
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    HAS_TARGET: tl.constexpr = rows.inputs.probs is None  # targets are indices unless they are probabilities
    v_end = rows.inputs.v_end
    v_target = v_start - 1
    if HAS_TARGET and TILE.BLOCK_N == 1:
        # The target's tile is computed apart, so that the logits of all other tiles do not pay for its terms.
        distance = rows.terms.target.local - v_start
        if (distance >= 0) & (distance < v_end - v_start):
            v_target = v_start + distance.to(tl.int32) // BLOCK_V * BLOCK_V
            gradient_tile(rows, v_target, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, False, True, IN, OUT)
    if TILE.BLOCK_N == 1:
        tail = v_start + (v_end - v_start) // BLOCK_V * BLOCK_V
        if (tail < v_end) & (tail != v_target):
            gradient_tile(rows, tail, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, False, False, IN, OUT)
        for up in range(v_start, tail, BLOCK_V):
            # Triton 3.6 does not see that a difference of multiples is a multiple.
            v = tl.multiple_of(v_start + tail - BLOCK_V - up, BLOCK_V)
            if v != v_target:
                gradient_tile(rows, v, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, True, False, IN, OUT)
    else:
        for v in range(v_start, v_end, BLOCK_V):
            gradient_tile(rows, v, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, False, HAS_TARGET, IN, OUT)


@triton.jit
def write_zeros(start, stride_v, v_start, v_end, offs, TILE: tl.constexpr):
    """Writes zeros over the classes of one row, for a tile of one row."""
    for v in range(v_start, v_end, TILE.BLOCK_V):
        store_tile(start, v, offs, stride_v, True, v_end, tl.zeros(offs.shape, tl.float32), TILE, False, "")
