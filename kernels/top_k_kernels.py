"""The kernels of distillation from a teacher's likeliest classes: they have all other classes of a row.

The logits of the likeliest classes were taken out of the rows, see `top_k.py`. With u the used logits, m the largest of
them and h the bits of a unit of u at a temperature, the sum over the other classes is

    s = sum 2^((u - m) h)

The difference is taken first, so that neither the size of logits nor that of h matters: what an exponent is off by is
relative to the exponent. A gradient is `factor 2^((u - m) h) / s`, summed over the temperatures.
"""

import triton
import triton.language as tl

from .device_math import LN2, LOG2E, by_lane, lane_max, lane_sum, number, row_max, row_sum, used_logits
from .distillation_structs import OtherLanes, OtherRows
from .gradient import write_zeros
from .structs import Curve, Gradients, Logits, Place, RowInputs
from .sums import first_of_largest
from .tiles import load_tile, store_tile, tile_offsets

#: The largest logit where there is none above -inf.
LOWEST, LOWEST64 = tl.constexpr(-3.4028234663852886e38), tl.constexpr(-1.7976931348623157e308)


@triton.jit
def inputs_of(start, stride_v, v_end):
    """What a program reads of a row."""
    NOTHING: tl.constexpr = None
    return RowInputs(
        x=start, stride_xv=stride_v, probs=NOTHING, stride_pv=0, weight=NOTHING, keep=tl.full((), True, tl.int1),
        v_end=v_end,
    )  # fmt: skip


@triton.jit
def other_tile(
    inputs, curve, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr, WHOLE: tl.constexpr
):
    """`used_logits` of a tile, -inf for the teacher's classes and beyond the last one."""
    x = load_tile(inputs.x, v, offs, inputs.stride_xv, inputs.keep, inputs.v_end, float("-inf"), TILE, WHOLE, "")
    u, slope = used_logits(x, curve, ACC, OPTIONS)
    if OPTIONS.HAS_SCALE or OPTIONS.HAS_SOFTCAP:  # -inf may have become a number, but no number has all bits set
        INTEGER: tl.constexpr = tl.core.get_int_dtype(x.dtype.primitive_bitwidth, True)
        u = tl.where(x.to(INTEGER, bitcast=True) == -1, float("-inf"), u)
        if not WHOLE:
            u = tl.where(offs < inputs.v_end - v, u, float("-inf"))
    return u, slope


@triton.jit
def scaling(scale, ACC: tl.constexpr):
    """The curve of `used_logits`, of which these kernels use nothing but the scale."""
    scale = number(scale, ACC)
    return Curve(scale=scale, height=scale, steep=scale, coarse=scale, nats=scale)


@triton.jit
def add_others(
    lanes, inputs, curve, height, height_two, v, offs, ACC: tl.constexpr, TILE: tl.constexpr, OPTIONS: tl.constexpr,
    TWO: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The lanes' sums (`OtherLanes`) with the tile that starts at class `v` added."""
    u, _ = other_tile(inputs, curve, v, offs, ACC, TILE, OPTIONS, WHOLE)
    u = by_lane(u, TILE)
    largest = lane_max(u)
    at, s, s_two, d = lanes.at, lanes.s, lanes.s_two, lanes.d
    if OPTIONS.HAS_STATS:
        at = tl.where(largest > lanes.best, v, at)
    best = tl.maximum(lanes.best, largest)
    z, down = u - best, lanes.best - best
    y, down_y, before = z * height, down * height, s
    e, power = tl.exp2(y), tl.exp2(down_y)
    s = s * power + lane_sum(e)
    if TWO:
        y, down_y, before = z * height_two, down * height_two, s_two
        e, power = tl.exp2(y), tl.exp2(down_y)
        s_two = s_two * power + lane_sum(e)
    if OPTIONS.HAS_STATS:  # what is further away than 2^-200 adds nothing, and 0 * -inf would be NaN
        d = power * (d + before * tl.maximum(down_y, -200.0)) + lane_sum(e * tl.maximum(y, -200.0))
    return OtherLanes(best=best, at=at, s=s, s_two=s_two, d=d)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def others_kernel(
    logits: Logits,
    target_ptr,  # (N,) int64
    rows_out: OtherRows,
    N,
    V,
    stride_xn,
    stride_xv,
    ignore_index: tl.int64,
    scale: tl.float64,
    cap: tl.float64,  # at the first temperature
    cap_two: tl.float64,  # at the second one
    TILE: tl.constexpr,  # Tile of one row
    OPTIONS: tl.constexpr,  # Options; statistics are those at the last temperature
    TWO: tl.constexpr,  # whether there are two temperatures
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    LANES: tl.constexpr = TILE.LANES
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    row = tl.program_id(0).to(tl.int64)
    if tl.load(target_ptr + row) == ignore_index:
        return
    inputs = inputs_of(logits.x + row * stride_xn // TILE.WIDTH * TILE.WIDTH, stride_xv, V)
    curve = scaling(scale, ACC)
    height, height_two = number(cap * LOG2E, ACC), number(cap_two * LOG2E, ACC)
    offs = tile_offsets(TILE, TILE.CHUNKS)
    zero = tl.zeros((1, 1, LANES, 1), ACC)
    low = zero + (LOWEST64 if ACC == tl.float64 else LOWEST)
    lanes = OtherLanes(best=low, at=zero.to(tl.int32), s=zero, s_two=zero, d=zero)
    whole_end = V // BLOCK_V * BLOCK_V
    for v in range(0, whole_end, BLOCK_V):
        lanes = add_others(lanes, inputs, curve, height, height_two, v, offs, ACC, TILE, OPTIONS, TWO, True)
    if whole_end < V:
        lanes = add_others(lanes, inputs, curve, height, height_two, whole_end, offs, ACC, TILE, OPTIONS, TWO, False)

    best = row_max(lanes.best, TILE)
    down = lanes.best - best
    down_y, before = down * height, lanes.s
    power = tl.exp2(down_y)
    s = row_sum(before * power, TILE)
    tl.store(rows_out.saved + row, best)
    tl.store(rows_out.saved + N + row, s)
    if TWO:
        down_y, before = down * height_two, lanes.s_two
        power = tl.exp2(down_y)
        s = row_sum(before * power, TILE)
        tl.store(rows_out.saved + 2 * N + row, s)
    if OPTIONS.HAS_STATS:
        d = row_sum(power * (lanes.d + before * tl.maximum(down_y, -200.0)), TILE)
        tl.store(rows_out.entropy + row, tl.where(s == 0.0, 0.0, (tl.log2(s) - d / s) * LN2))
        predicted = first_of_largest(lanes, inputs, 0, offs, curve, best, ACC, TILE, OPTIONS)
        tl.store(rows_out.predicted + row, predicted)


@triton.jit
def other_gradient_tile(
    inputs, curve, best, height, height_two, a, a_two, dx, stride_dxv, v, offs, ACC: tl.constexpr, TILE: tl.constexpr,
    OPTIONS: tl.constexpr, TWO: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the tile that starts at class `v`; for the teacher's classes, 0 or NaN."""
    u, slope = other_tile(inputs, curve, v, offs, ACC, TILE, OPTIONS, WHOLE)
    z = u - best
    grad = tl.exp2(z * height) * a
    if TWO:
        grad += tl.exp2(z * height_two) * a_two
    if OPTIONS.HAS_SOFTCAP:
        grad *= slope
    store_tile(dx, v, offs, stride_dxv, True, inputs.v_end, grad, TILE, WHOLE, "")


@triton.jit
def multiplier(factor_ptr, s_ptr, steep, ACC: tl.constexpr):
    """What powers are multiplied by; 0 where there is no other class."""
    s = tl.load(s_ptr)
    return tl.where(s == 0.0, 0.0, tl.load(factor_ptr).to(ACC) * number(steep, ACC) / s)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def others_backward_kernel(
    logits: Logits,
    gradients: Gradients,  # of x only
    target_ptr,  # (N,) int64
    saved_ptr,  # (2 or 3, N), see `OtherRows`
    factor_ptr,  # (1 or 2, N) float64: the gradients of the logarithms of the sums
    N: tl.int64,
    V,
    place: Place,
    stride_xn,
    stride_xv,
    stride_dxn,
    stride_dxv,
    ignore_index: tl.int64,
    scale: tl.float64,
    cap: tl.float64,
    cap_two: tl.float64,
    TILE: tl.constexpr,
    OPTIONS: tl.constexpr,
    TWO: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    offs = tile_offsets(TILE, TILE.CHUNKS)
    pid = tl.program_id(0)
    row = (pid // place.splits).to(tl.int64)
    v_start = (pid % place.splits) * place.split_tiles * BLOCK_V
    v_end = tl.minimum(v_start + place.split_tiles * BLOCK_V, V)
    dx = gradients.dx + row * stride_dxn // TILE.WIDTH * TILE.WIDTH
    if tl.load(target_ptr + row) == ignore_index:
        write_zeros(dx, stride_dxv, v_start, v_end, offs, TILE)
        return
    inputs = inputs_of(logits.x + row * stride_xn // TILE.WIDTH * TILE.WIDTH, stride_xv, v_end)
    curve = scaling(scale, ACC)
    height, height_two = number(cap * LOG2E, ACC), number(cap_two * LOG2E, ACC)
    best = tl.load(saved_ptr + row)
    a = multiplier(factor_ptr + row, saved_ptr + N + row, scale * cap, ACC)
    a_two = a
    if TWO:
        a_two = multiplier(factor_ptr + N + row, saved_ptr + 2 * N + row, scale * cap_two, ACC)
    whole_end = v_start + (v_end - v_start) // BLOCK_V * BLOCK_V
    for v in range(v_start, whole_end, BLOCK_V):
        v = tl.multiple_of(v, BLOCK_V)
        other_gradient_tile(
            inputs, curve, best, height, height_two, a, a_two, dx, stride_dxv, v, offs, ACC, TILE, OPTIONS, TWO, True
        )
    if whole_end < v_end:
        other_gradient_tile(
            inputs, curve, best, height, height_two, a, a_two, dx, stride_dxv, whole_end, offs, ACC, TILE, OPTIONS,
            TWO, False,
        )  # fmt: skip
