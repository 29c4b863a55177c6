"""Loss and gradient in one launch: each row is read from device memory once.

A program walks a row forward for its sums and backwards for its gradient. The second read finds the row in the L2
cache as long as the rows in flight fit into it. `one_pass_launch` therefore limits the number of programs, each of
which takes one row after the other.
"""

import triton
import triton.language as tl

from .device_math import LN2, exponent, fused_multiply_add, loss_options, number, row_curve, used_logits, weighted
from .gradient import load_upstream, loss_gradient, row_terms, write_gradient, write_zeros
from .structs import (
    GradientRows,
    Gradients,
    Logits,
    OnePassStrides,
    OnePassUpstream,
    RowInputs,
    RowOutputs,
    Rows,
    RowSums,
    Targets,
)
from .sums import row_sums, signed, store_ignored, store_kept, target_weight
from .tiles import row_start, tile_offsets


@triton.jit
def finish_row(
    rows_out, row, N, sums, x_target, target, w_target, g, upstream, strides, everywhere, z_loss, options,
    ACC: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Stores the results of a kept row, and returns the numbers of its gradient (`Terms`).

    `sums` are without the target's terms, and `strides` are those of `upstream`.
    """
    c, s, r, mass = sums.c, sums.s, sums.r, sums.mass
    u_target, _ = used_logits(x_target, options.curve, ACC, OPTIONS)
    height, nats = row_curve(options.curve, sums.far)
    r += weighted(w_target * options.smoothing.confidence, exponent(u_target, height * 0.25, c * 0.25))
    mass += w_target * options.smoothing.confidence
    sums = RowSums(
        c=c, s=s, r=r, mass=mass, d=sums.d, largest=sums.largest, predicted=sums.predicted, far=sums.far
    )  # fmt: skip
    store_kept(rows_out, row, N, everywhere, everywhere, sums, options.curve)
    dlse = 0.0
    if upstream.dz is not None:
        lse = fused_multiply_add(c, nats, tl.log2(s) * LN2)
        dz = load_upstream(upstream.dz, strides.dz, row, everywhere, ACC)
        dlse = dz * lse * (2.0 * number(z_loss, ACC))
    return row_terms(g, dlse, 0.0, c, signed(s, sums.far), mass, 0.0, w_target, target, options)


@triton.jit(do_not_specialize=["N", "T", "ignore_index"])
def one_pass_kernel(
    logits: Logits,  # without probabilities
    gradients: Gradients,  # of x only
    targets: Targets,
    rows_out: Rows,
    upstream: OnePassUpstream,
    N,  # B * T
    T,
    V,
    strides: OnePassStrides,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    z_loss: tl.float64,
    TILE: tl.constexpr,  # Tile of one row
    OPTIONS: tl.constexpr,  # Options
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    NO_PROBS: tl.constexpr = None
    options = loss_options(V, smoothing, scale, cap, ACC, OPTIONS)
    everywhere = tl.full((), True, tl.int1)

    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        # This adds 0, the sign of `row`, which the compiler does not know. Without it, the compiler would keep a
        # register for the offset of each logit from one row to the next.
        offs = tile_offsets(TILE, TILE.CHUNKS) + (tl.cast(row, tl.int32) >> 31) * TILE.BLOCK_V
        b, t = row // T, row % T
        x_row = row_start(logits.x, b, t, strides.x, TILE.WIDTH)
        dx_row = row_start(gradients.dx, b, t, strides.dx, TILE.WIDTH)
        target = tl.load(targets.target + row)
        if target == ignore_index:
            store_ignored(rows_out, row, N, everywhere)
            write_zeros(dx_row, strides.dx.v, 0, V, offs, TILE)
        else:
            own = (target >= 0) & (target < V)
            x_target = tl.load(x_row + target * strides.x.v, mask=own, other=0.0)
            w_target = target_weight(targets.weight, target, own, ACC)
            g = loss_gradient(upstream, strides.upstream, row, everywhere, ACC)
            inputs = RowInputs(
                x=x_row, stride_xv=strides.x.v, probs=NO_PROBS, stride_pv=0, weight=targets.weight, keep=everywhere,
                v_end=V,
            )  # fmt: skip
            sums = row_sums(inputs, 0, offs, options, ACC, TILE, OPTIONS, OPTIONS.HAS_STATS, "evict_last")
            terms = finish_row(
                rows_out, row, N, sums, x_target, target, w_target, g, upstream, strides.upstream, everywhere, z_loss,
                options, ACC, OPTIONS,
            )  # fmt: skip
            outputs = RowOutputs(dx=dx_row, stride_dxv=strides.dx.v, dprobs=NO_PROBS, stride_dpv=0, inside=everywhere)
            rows = GradientRows(inputs=inputs, outputs=outputs, terms=terms, options=options)
            write_gradient(rows, 0, offs, ACC, TILE, OPTIONS, False, "evict_first", "evict_first")
            tl.device_assert(own, "fused_ignore_ce: target out of range [0, number of classes)")
