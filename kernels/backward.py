"""The backward kernel: reads and writes each kept row once, and writes zeros over ignored rows without reading them."""

import triton
import triton.language as tl

from .device_math import loss_options
from .gradient import load_upstream, loss_gradient, row_terms, write_gradient, write_zeros
from .structs import (
    BackwardStrides,
    GradientRows,
    Gradients,
    Logits,
    Place,
    RowInputs,
    RowOutputs,
    Saved,
    Targets,
    Upstream,
)
from .sums import target_weight
from .tiles import row_start, rows_of, tile_offsets


@triton.jit(do_not_specialize=["T", "ignore_index"])
def backward_kernel(
    logits: Logits,
    gradients: Gradients,
    targets: Targets,
    saved: Saved,
    upstream: Upstream,
    N: tl.int64,  # B * T
    T,
    V,
    place: Place,
    strides: BackwardStrides,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    TILE: tl.constexpr,  # Tile
    OPTIONS: tl.constexpr,  # Options
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    offs = tile_offsets(TILE, TILE.CHUNKS)

    pid = tl.program_id(0)
    v_start = (pid % place.splits) * place.split_tiles * BLOCK_V
    v_end = tl.minimum(v_start + place.split_tiles * BLOCK_V, V)
    b, t, inside = rows_of(pid // place.splits, T, TILE.BLOCK_N)
    row = b.to(tl.int64) * T + t
    target = tl.load(targets.target + row, mask=inside, other=ignore_index)
    keep = inside & (target != ignore_index)
    if TILE.BLOCK_N == 1:  # noqa: SIM102 (known at compile time, unlike the target)
        if target == ignore_index:
            if gradients.dx is not None:
                zeros_row = row_start(gradients.dx, b, t, strides.dx, TILE.WIDTH)
                write_zeros(zeros_row, strides.dx.v, v_start, v_end, offs, TILE)
            if gradients.dprobs is not None:
                zeros_row = row_start(gradients.dprobs, b, t, strides.dprobs, TILE.WIDTH)
                write_zeros(zeros_row, strides.dprobs.v, v_start, v_end, offs, TILE)
            return

    options = loss_options(place.classes, smoothing, scale, cap, ACC, OPTIONS)
    g = loss_gradient(upstream, strides.upstream, row, keep, ACC)
    c = tl.load(saved.norm + row, mask=keep, other=0.0)
    s = tl.load(saved.norm + N + row, mask=keep, other=1.0)
    mass = tl.load(saved.norm + 2 * N + row, mask=keep, other=0.0)
    dlse, dentropy, entropy = 0.0, 0.0, 0.0
    if upstream.dlse is not None:
        dlse = load_upstream(upstream.dlse, strides.upstream.dlse, row, keep, ACC)
    HAS_ENTROPY: tl.constexpr = upstream.dentropy is not None
    if HAS_ENTROPY:
        dentropy = load_upstream(upstream.dentropy, strides.upstream.dentropy, row, keep, ACC)
        entropy = tl.load(saved.entropy + row, mask=keep, other=0.0)
    local = target - place.first_class
    if logits.probs is None:
        probs_row: tl.constexpr = None
        w_target = target_weight(targets.weight, local, keep & (local >= v_start) & (local < v_end), ACC)
    else:
        probs_row = row_start(logits.probs, b, t, strides.probs, TILE.WIDTH)
        w_target = 0.0
    terms = row_terms(g, dlse, dentropy, c, s, mass, entropy, w_target, local, options)
    x_row = row_start(logits.x, b, t, strides.x, TILE.WIDTH)
    if gradients.dx is None:
        dx_row: tl.constexpr = None
    else:
        dx_row = row_start(gradients.dx, b, t, strides.dx, TILE.WIDTH)
    if gradients.dprobs is None:
        dprobs_row: tl.constexpr = None
    else:
        dprobs_row = row_start(gradients.dprobs, b, t, strides.dprobs, TILE.WIDTH)
    inputs = RowInputs(
        x=x_row, stride_xv=strides.x.v, probs=probs_row, stride_pv=strides.probs.v, weight=targets.weight, keep=keep,
        v_end=v_end,
    )  # fmt: skip
    outputs = RowOutputs(
        dx=dx_row, stride_dxv=strides.dx.v, dprobs=dprobs_row, stride_dpv=strides.dprobs.v, inside=inside
    )
    rows = GradientRows(inputs=inputs, outputs=outputs, terms=terms, options=options)
    write_gradient(rows, v_start, offs, ACC, TILE, OPTIONS, HAS_ENTROPY, "", "")
