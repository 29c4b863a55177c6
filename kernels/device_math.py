"""Arithmetic that the kernels share: exponentials in base two, shapes of tiles, and the options applied to logits.

**Base two.** The hardware raises two to a power in one instruction and e in six. With L = log2(e) and a whole number
`c`, the exponent `x * L - c` is one fused multiply-add, whose only rounding is that of its small result. Since shifts
are whole numbers, a sum relative to one shift is rescaled to another by a power of two, without rounding.

**Tiles.** A program reads tiles of BLOCK_N rows and of CHUNKS * LANES * WIDTH classes. Of every chunk, a thread holds
the WIDTH neighbouring logits of its lane, which are one access of 16 bytes. Sums over chunks and width therefore stay
inside a thread; lanes are merged once, after the loop. Tiles are loaded in the shape (BLOCK_N, CHUNKS * LANES, WIDTH),
so that the compiler cannot give neighbouring threads different chunks. For sums over what a lane holds, they are
reshaped to (BLOCK_N, CHUNKS, LANES, WIDTH). Values per row have the shape (BLOCK_N, 1, 1), or are scalars where a
program has one row; values per lane have the shape (BLOCK_N, 1, LANES, 1).
"""

import triton
import triton.language as tl

from .structs import Curve, LossOptions, Smoothing

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: The exponents from which on a shift is too coarse, in float32 and in float64, see `shift_of`.
FAR, FAR64 = tl.constexpr(2.0**31), tl.constexpr(2.0**62)

#: An index above those of all classes.
NO_CLASS = tl.constexpr(2147483647)

#: Whether to emulate fused multiply-add, whose product Triton's interpreter rounds.
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def number(x, dtype: tl.constexpr):
    """A scalar of a dtype. Gluon has no scalar `full`, and `cast` rounds constants to float32 first."""
    if dtype == tl.float64:
        return tl.full((), x, dtype)
    else:
        return tl.cast(x, dtype)


@triton.jit
def fused_multiply_add(x, y, z):
    """`x * y + z`, rounded once."""
    if EMULATED and x.dtype == tl.float32:
        result = (x.to(tl.float64) * y.to(tl.float64) + z).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def by_lane(x, TILE: tl.constexpr):
    """Reshapes a tile to (BLOCK_N, CHUNKS, LANES, WIDTH), which those on the chip have from the start."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    LANES: tl.constexpr = TILE.LANES
    WIDTH: tl.constexpr = TILE.WIDTH
    CHUNKS: tl.constexpr = x.numel // (BLOCK_N * LANES * WIDTH)
    if len(x.shape) == 4:
        return x
    else:
        return tl.reshape(x, (BLOCK_N, CHUNKS, LANES, WIDTH))


@triton.jit
def over_tile(x, TILE: tl.constexpr, ON_CHIP: tl.constexpr):
    """Broadcasts values of lanes over each access of a tile: (BLOCK_N, CHUNKS * LANES, 1)."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    CHUNKS: tl.constexpr = TILE.CHUNKS
    LANES: tl.constexpr = TILE.LANES
    if ON_CHIP:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x, (BLOCK_N, CHUNKS, LANES, 1)), (BLOCK_N, CHUNKS * LANES, 1))


@triton.jit
def over_lanes(x, TILE: tl.constexpr):
    """Broadcasts values of rows over their lanes."""
    if TILE.BLOCK_N == 1:
        return x
    else:
        return x[:, :, :, None]


@triton.jit
def lane_max(x):
    """The largest value that each lane holds."""
    return tl.max(tl.max(x, 3, keep_dims=True), 1, keep_dims=True)


@triton.jit
def lane_sum(x):
    """The sum of what each lane holds."""
    return tl.sum(tl.sum(x, 3, keep_dims=True), 1, keep_dims=True)


@triton.jit
def row_max(x, TILE: tl.constexpr):
    """The largest value of each row's lanes; a scalar where there is one row."""
    if TILE.BLOCK_N == 1:
        return tl.max(x)
    else:
        return tl.max(x, 2)


@triton.jit
def row_sum(x, TILE: tl.constexpr):
    """The sum over each row's lanes; a scalar where there is one row.

    Adding 0 rounds a product before the sum. Otherwise, each of two lanes would fuse its own product into the sum with
    the other one's, and they would come to different sums. Triton 3.9 lets all lanes of a warp store that sum.
    """
    if TILE.BLOCK_N == 1:
        return tl.sum(x + 0.0)
    else:
        return tl.sum(x + 0.0, 2)


@triton.jit
def row_any(x, TILE: tl.constexpr):
    """Whether any row of a program has a property."""
    if TILE.BLOCK_N == 1:
        return x
    else:
        return tl.max(x.to(tl.int32)) > 0


@triton.jit
def row_min_of_tile(x, TILE: tl.constexpr):
    """The smallest value in each row of a tile; a scalar where there is one row."""
    if TILE.BLOCK_N == 1:
        return tl.min(x)
    else:
        return tl.min(tl.min(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def tanh(z):
    """Tanh to about one float32 ulp and its slope, from powers of two alone.

    With e = exp(-2|z|): tanh |z| = (1 - e) / (1 + e), and the slope 4 e / (1 + e)^2 does not cancel where tanh
    saturates, as 1 - tanh^2 does. Near 0, where 1 - e cancels, float32 takes an odd polynomial (least-squares fit of
    (tanh(z)/z - 1) / z^2 in z^2 on |z| < 0.55). Float64, which is used for checks, has enough digits without it.
    """
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
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
def tanh_of_half(z):
    """Tanh and its slope to 7e-7 absolute, which is far below the resolution of a 16-bit `z`, in six instructions.

    The bound is reached where the exponential vanishes: 4 * 2^-22.9 of the approximate root, which counts twice in its
    square and that twice in tanh, and the roundings of the sum and of the result. A division would take three
    instructions more.
    """
    root = tl.rsqrt(1.0 + tl.exp2(z * (2.0 * LOG2E)))
    t = fused_multiply_add(-2.0 * root, root, 1.0)
    return t, 1.0 - t * t


@triton.jit
def used_logits(x, curve, ACC: tl.constexpr, OPTIONS: tl.constexpr):
    """Returns `tanh(scale * x)` and the slope of tanh there; without a softcap, `scale * x` and 1.

    They are multiplied by the curve's height, log2(e) times the cap if there is one, in the fused multiply-add of
    `exponent`, so that the product with the cap is not rounded separately.
    """
    u = x.to(ACC)
    if OPTIONS.HAS_SCALE or OPTIONS.HAS_SOFTCAP:
        u = u * curve.scale
    if OPTIONS.HAS_SOFTCAP and x.dtype.primitive_bitwidth == 16:
        return tanh_of_half(u)
    elif OPTIONS.HAS_SOFTCAP:
        return tanh(u)
    else:
        return u, 1.0


@triton.jit
def exponent(u, height, c):
    """`log2(exp(used logit)) - c`, from `u` and `height` as in `used_logits`."""
    return fused_multiply_add(u, height, -c)


@triton.jit
def lowest(like):
    """The shift where there is no logit above -inf."""
    return -FAR64 if like.dtype == tl.float64 else -FAR


@triton.jit
def row_curve(curve, far):
    """(height, nats of a unit of exponents) of each row."""
    return tl.where(far, curve.coarse, curve.height), tl.where(far, curve.nats, number(LN2, curve.nats.dtype))


@triton.jit
def shift_of(largest, curve):
    """(shift, whether it is far from zero) for the largest `u` of `used_logits`.

    From `FAR` on, neighbouring floating-point numbers lie so far apart that only the largest logits of a row have a
    probability above 0, and a whole shift may differ from the largest exponent by more than 2^x can bear. There, the
    height is a power of two: the shift is exact, no product with it overflows, and 2^(y - c) is 1 or as good as 0.
    """
    y = largest * curve.height
    far = (tl.abs(y) >= -lowest(y)) & (tl.abs(largest) < float("inf"))
    return tl.where(far, largest * curve.coarse, tl.maximum(tl.floor(y), lowest(y))), far


@triton.jit
def capped_curve(scale, cap, ACC: tl.constexpr):
    """The curve of `cap * tanh(scale * x)`, or of `scale * x` for a cap of 1."""
    scale, cap = number(scale, ACC), number(cap, ACC)
    height = cap * LOG2E
    coarse = tl.exp2(tl.floor(tl.log2(height)))
    return Curve(scale=scale, height=height, steep=scale * cap, coarse=coarse, nats=cap / coarse)


@triton.jit
def weighted(q, z):
    """`q * z` with 0 * inf = 0: a class of no weight contributes nothing, whatever its logit."""
    return tl.where(q == 0, 0.0, q * z)


@triton.jit
def loss_options(classes, smoothing, scale, cap, ACC: tl.constexpr, OPTIONS: tl.constexpr):
    """The options of the loss in the dtype of sums."""
    smoothing = number(smoothing, ACC)
    if OPTIONS.HAS_SOFTCAP:
        curve = capped_curve(scale, cap, ACC)
    else:
        one, scale = number(1.0, ACC), number(scale, ACC)
        curve = Curve(scale=scale, height=one * LOG2E, steep=scale, coarse=one, nats=one)
    of_target = Smoothing(confidence=1.0 - smoothing, share=smoothing / classes)
    return LossOptions(smoothing=of_target, curve=curve)
