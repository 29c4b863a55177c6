"""Element-wise mathematics that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """Tanh to one float32 ulp of relative error, from `exp` alone, so that the interpreter runs it too.

    `1 - 2 / (exp(2|z|) + 1)` cancels near 0; there, float32 takes an odd polynomial instead
    (least-squares fit of (tanh(z)/z - 1) / z^2 in z^2 on |z| < 0.55). float64 needs no more than the
    exponential form: it is used to check, and 1e-16 of absolute error is enough.
    """
    a = tl.abs(z)
    # 2|z| <= 88 keeps exp finite; tanh is 1 to the last bit from |z| = 20 on.
    t = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(a < 44.0, a, 44.0)) + 1.0)
    t = tl.where(z < 0, -t, t)
    t = tl.where(z != z, z, t)
    if z.dtype == tl.float32:
        u = z * z
        poly = -0.00642453665706975 * u + 0.02118259672040277
        poly = poly * u - 0.0538805392366189
        poly = poly * u + 0.13332869505536724
        poly = poly * u - 0.3333332641618652
        t = tl.where(a < 0.55, z + z * (u * poly), t)
    return t


@triton.jit
def used_logits(x, pre_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The logits that the loss sees: `softcap * tanh(pre_scale * x)`, or `pre_scale * x` without a cap."""
    if HAS_SOFTCAP:
        x = softcap * tanh(x * pre_scale)
    elif HAS_SCALE:
        x = x * pre_scale
    return x


@triton.jit
def used_logits_slope(used, pre_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """D used / d x, from the used logits."""
    slope = pre_scale
    if HAS_SOFTCAP:
        t = used / softcap
        slope = pre_scale * softcap * (1.0 - t * t)
    return slope


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
    V,
    ACC: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Per class, the weight of its log-probability that does not come from an index target."""
    if HAS_PROBS:
        # Also without smoothing: Triton 3.7 fails (TritonGPUOptimizeThreadLocality) to sum a float32 tensor that
        # comes straight from memory, in a loop.
        q = tl.load(probs_ptrs, mask=mask, other=0.0).to(ACC)
        q = tl.where(mask, q * (1.0 - smoothing) + smoothing / V, 0.0)
    else:
        q = tl.where(mask, smoothing / V, 0.0)
    if HAS_WEIGHT:
        q = q * tl.load(weight_ptrs, mask=mask_v, other=0.0).to(ACC)[None, :]
    return q
