"""Loss and gradient in one launch: each row is read from device memory once.

A program walks a row forward for its sums and backwards for its gradient. The second read finds the row in the L2
cache as long as the rows in flight fit into it. `one_pass_launch` therefore limits the number of programs, each of
which takes one row after the other.
"""

import triton
import triton.language as tl

from .device_math import LN2, exponent, fused_multiply_add, loss_options, used_logits, weighted
from .gradient import load_upstream, loss_gradient, row_terms, write_gradient, write_zeros
from .sums import row_sums, store_kept, store_row, target_weight
from .tiles import row_start, tile_offsets


@triton.jit(do_not_specialize=["N", "T", "ignore_index"])
def one_pass_kernel(
    x_ptr,  # (B, T, V)
    dx_ptr,  # (B, T, V), may be x itself
    target_ptr,  # (N,) int64, N = B * T
    weight_ptr,  # (V,) or None
    rows_out,  # where `store_row` writes
    upstream,  # see `loss_gradient`, with dz (or None) in place of dlse
    N,
    T,
    V,
    strides,  # of x, dx (each of B, T and V), and of upstream
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    z_loss: tl.float64,
    TILE: tl.constexpr,  # (1, CHUNKS, LANES, WIDTH)
    OPTIONS: tl.constexpr,  # (HAS_SOFT, HAS_SCALE, HAS_SOFTCAP, HAS_STATS)
):
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    HAS_STATS: tl.constexpr = OPTIONS[3]
    NO_PROBS: tl.constexpr = None
    strides_x, strides_dx, strides_upstream = strides
    soft, curve, steep = loss_options(V, smoothing, scale, cap, ACC, OPTIONS)
    loss = (weight_ptr, soft, curve)
    everywhere = tl.full((), True, tl.int1)

    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        # This adds 0, the sign of `row`, which the compiler does not know. Without it, the compiler would keep a
        # register for the offset of each logit from one row to the next.
        offs = tile_offsets(TILE) + (tl.cast(row, tl.int32) >> 31) * BLOCK_V
        b, t = row // T, row % T
        x_row = row_start(x_ptr, b, t, strides_x, TILE[3])
        dx_row = row_start(dx_ptr, b, t, strides_dx, TILE[3])
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            store_row(rows_out, row, N, everywhere, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
            write_zeros(dx_row, strides_dx[2], 0, V, offs, BLOCK_V)
        else:
            own = (target >= 0) & (target < V)
            x_target = tl.load(x_row + target * strides_x[2], mask=own, other=0.0)
            w_target = target_weight(weight_ptr, target, own, ACC)
            g = loss_gradient(upstream, strides_upstream, row, everywhere, ACC)
            rows = (x_row, strides_x[2], NO_PROBS, 0, everywhere, V)
            c, s, r, mass, d, _, predicted = row_sums(
                rows, 0, offs, loss, ACC, TILE, OPTIONS, HAS_STATS, HAS_STATS, "evict_last"
            )
            u_target, _ = used_logits(x_target, curve, ACC, OPTIONS)
            r += weighted(w_target * soft[0], exponent(u_target, curve[1], c))
            mass += w_target * soft[0]
            store_kept(rows_out, row, N, everywhere, everywhere, c, s, r, mass, d, predicted)
            dlse = 0.0
            if upstream[3] is not None:
                lse = fused_multiply_add(c, tl.full((), LN2, ACC), tl.log2(s) * LN2)
                dz = load_upstream(upstream[3], strides_upstream[3], row, everywhere, ACC)
                dlse = dz * lse * (2.0 * tl.full((), z_loss, ACC))
            terms = row_terms(g, dlse, 0.0, c, s, mass, 0.0, w_target, target, soft, steep)
            out = (dx_row, strides_dx[2], NO_PROBS, 0, everywhere)
            write_gradient((rows, out, terms, loss), 0, offs, ACC, TILE, OPTIONS, False, "evict_first", "evict_first")
            tl.device_assert(own, "fused_ignore_ce: target out of range [0, number of classes)")
