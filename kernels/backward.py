"""The backward kernel: reads and writes each kept row once, and writes zeros over ignored rows without reading them."""

import triton
import triton.language as tl

from .device_math import loss_options
from .gradient import load_upstream, loss_gradient, row_terms, write_gradient, write_zeros
from .sums import target_weight
from .tiles import row_start, rows_of, tile_offsets


@triton.jit(do_not_specialize=["T", "ignore_index"])
def backward_kernel(
    x_ptr,  # (B, T, V)
    probs_ptr,  # (B, T, V) or None
    dx_ptr,  # (B, T, V), may be x itself; or None
    dprobs_ptr,  # (B, T, V) or None
    target_ptr,  # (B * T,) int64
    weight_ptr,  # (V,) or None
    saved,  # norm (3, B * T), entropy (B * T,) or None
    upstream,  # see `loss_gradient`
    N: tl.int64,
    T,
    V,
    place,  # (splits per row, tiles per split, first class, classes)
    strides,  # of x, probs, dx, dprobs (each of B, T and V), and of upstream
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    TILE: tl.constexpr,  # (BLOCK_N, CHUNKS, LANES, WIDTH)
    OPTIONS: tl.constexpr,  # (HAS_SOFT, HAS_SCALE, HAS_SOFTCAP)
):
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    splits, split_tiles, first_class, classes = place
    strides_x, strides_probs, strides_dx, strides_dprobs, strides_upstream = strides
    offs = tile_offsets(TILE)

    pid = tl.program_id(0)
    v_start = (pid % splits) * split_tiles * BLOCK_V
    v_end = tl.minimum(v_start + split_tiles * BLOCK_V, V)
    b, t, inside = rows_of(pid // splits, T, BLOCK_N)
    row = b.to(tl.int64) * T + t
    target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    keep = inside & (target != ignore_index)
    if BLOCK_N == 1:  # noqa: SIM102 (known at compile time, unlike the target)
        if target == ignore_index:
            if dx_ptr is not None:
                write_zeros(row_start(dx_ptr, b, t, strides_dx, TILE[3]), strides_dx[2], v_start, v_end, offs, BLOCK_V)
            if dprobs_ptr is not None:
                zeros_row = row_start(dprobs_ptr, b, t, strides_dprobs, TILE[3])
                write_zeros(zeros_row, strides_dprobs[2], v_start, v_end, offs, BLOCK_V)
            return

    soft, curve, steep = loss_options(classes, smoothing, scale, cap, ACC, OPTIONS)
    g = loss_gradient(upstream, strides_upstream, row, keep, ACC)
    norm_ptr, entropy_ptr = saved
    c = tl.load(norm_ptr + row, mask=keep, other=0.0)
    s = tl.load(norm_ptr + N + row, mask=keep, other=1.0)
    mass = tl.load(norm_ptr + 2 * N + row, mask=keep, other=0.0)
    dlse, dentropy, entropy = 0.0, 0.0, 0.0
    if upstream[3] is not None:
        dlse = load_upstream(upstream[3], strides_upstream[3], row, keep, ACC)
    HAS_ENTROPY: tl.constexpr = upstream[4] is not None
    if HAS_ENTROPY:
        dentropy = load_upstream(upstream[4], strides_upstream[4], row, keep, ACC)
        entropy = tl.load(entropy_ptr + row, mask=keep, other=0.0)
    local = target - first_class
    if probs_ptr is None:
        probs_row: tl.constexpr = None
        w_target = target_weight(weight_ptr, local, keep & (local >= v_start) & (local < v_end), ACC)
    else:
        probs_row = row_start(probs_ptr, b, t, strides_probs, TILE[3])
        w_target = 0.0
    terms = row_terms(g, dlse, dentropy, c, s, mass, entropy, w_target, local, soft, steep)
    x_row = row_start(x_ptr, b, t, strides_x, TILE[3])
    if dx_ptr is None:
        dx_row: tl.constexpr = None
    else:
        dx_row = row_start(dx_ptr, b, t, strides_dx, TILE[3])
    if dprobs_ptr is None:
        dprobs_row: tl.constexpr = None
    else:
        dprobs_row = row_start(dprobs_ptr, b, t, strides_dprobs, TILE[3])
    rows = (x_row, strides_x[2], probs_row, strides_probs[2], keep, v_end)
    out = (dx_row, strides_dx[2], dprobs_row, strides_dprobs[2], inside)
    row_of = (rows, out, terms, (weight_ptr, soft, curve))
    write_gradient(row_of, v_start, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, "", "")
