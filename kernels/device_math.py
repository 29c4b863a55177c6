"""Element-wise mathematics that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """Tanh to about one float32 ulp and its slope, from `exp` alone, so that the interpreter runs it too.

    With e = exp(-2|z|): tanh |z| = (1 - e) / (1 + e), and the slope 4 e / (1 + e)^2 does not cancel where tanh
    saturates, as 1 - tanh^2 does. Near 0, where 1 - e cancels, float32 takes an odd polynomial (least-squares fit of
    (tanh(z)/z - 1) / z^2 in z^2 on |z| < 0.55); float64, which is used to check, has digits enough.
    """
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    t = tl.where(z < 0, -t, t)
    if z.dtype == tl.float32:
        u = z * z
        poly = -0.00642453665706975 * u + 0.02118259672040277
        poly = poly * u - 0.0538805392366189
        poly = poly * u + 0.13332869505536724
        poly = poly * u - 0.3333332641618652
        t = tl.where(tl.abs(z) < 0.55, z + z * (u * poly), t)
    return t, slope


@triton.jit
def used_logits(x, pre_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The logits that the loss sees, `softcap * tanh(pre_scale * x)` or `pre_scale * x`, and their slope in x."""
    slope = pre_scale
    if HAS_SOFTCAP:
        x, slope = tanh(x * pre_scale)
        x *= softcap
        slope *= softcap * pre_scale
    elif HAS_SCALE:
        x = x * pre_scale
    return x, slope


@triton.jit
def finite_or_zero(m):
    """A running maximum as a shift: 0 while every logit seen was -inf, so that -inf - shift stays -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def weighted(w, z):
    """`w * z` with 0 * inf = 0: a class of no weight contributes nothing, whatever its logit."""
    return tl.where(w == 0, 0.0, w * z)


@triton.jit
def soft_target(
    probs_ptrs,
    weight_ptrs,
    mask,
    mask_v,
    smoothing,
    uniform,
    ACC: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Per class, the weight of its log-probability that does not come from an index target.

    `uniform` is the smoothing's share of one class.
    """
    if HAS_PROBS:
        # Also without smoothing: Triton 3.7 fails (TritonGPUOptimizeThreadLocality) to sum a float32 tensor that
        # comes straight from memory, in a loop.
        q = tl.load(probs_ptrs, mask=mask, other=0.0).to(ACC)
        q = tl.where(mask, q * (1.0 - smoothing) + uniform, 0.0)
    else:
        q = tl.where(mask, uniform, 0.0)
    if HAS_WEIGHT:
        q = q * tl.load(weight_ptrs, mask=mask_v, other=0.0).to(ACC)[None, :]
    return q
