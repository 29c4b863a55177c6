"""Multiplies a gradient that forward has computed by the upstream gradient, unless that is 1."""

import triton
import triton.language as tl

from .tiles import load_tile, row_start, rows_of, store_tile, tile_offsets


@triton.jit(do_not_specialize=["blocks", "T"])
def scale_kernel(
    x_ptr,  # (B, T, V)
    out_ptr,  # (B, T, V), may be x itself
    dloss_ptr,  # a scalar
    factor_ptr,  # a scalar or None
    blocks,  # of BLOCK_N rows
    T,
    V,
    strides,  # of x and out, each of B, T and V
    TILE: tl.constexpr,  # (BLOCK_N, CHUNKS, LANES, WIDTH)
    INPLACE: tl.constexpr,
    ACC: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    product = tl.load(dloss_ptr).to(ACC)
    if factor_ptr is not None:
        product *= tl.load(factor_ptr).to(ACC)
    if INPLACE and product == 1.0:
        return
    offs = tile_offsets(TILE)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        b, t, inside = rows_of(tl.cast(block, tl.int32), T, BLOCK_N)
        start = row_start(x_ptr, b, t, strides[0], TILE[3])
        out = row_start(out_ptr, b, t, strides[1], TILE[3])
        for v in range(0, V, BLOCK_V):
            x = load_tile(start, v, offs, strides[0][2], inside, V, 0.0, BLOCK_N, False, "").to(ACC)
            # A gradient of 0, as that of an ignored row, stays 0 even where the product is inf or NaN.
            x = tl.where(x == 0, 0.0, x * product)
            store_tile(out, v, offs, strides[1][2], inside, V, x, BLOCK_N, False, "")
