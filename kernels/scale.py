"""Multiplies a gradient that forward has computed by the upstream gradient, unless that is 1."""

import triton
import triton.language as tl

from .structs import Product, ProductStrides
from .tiles import load_tile, row_start, rows_of, store_tile, tile_offsets


@triton.jit(do_not_specialize=["blocks", "T"])
def scale_kernel(
    product: Product,
    blocks,  # of BLOCK_N rows
    T,
    V,
    strides: ProductStrides,
    TILE: tl.constexpr,  # Tile
    INPLACE: tl.constexpr,
    ACC: tl.constexpr,
):
    factor = tl.load(product.dloss).to(ACC)
    if product.factor is not None:
        factor *= tl.load(product.factor).to(ACC)
    if INPLACE and factor == 1.0:
        return
    offs = tile_offsets(TILE, TILE.CHUNKS)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        b, t, inside = rows_of(tl.cast(block, tl.int32), T, TILE.BLOCK_N)
        start = row_start(product.x, b, t, strides.x, TILE.WIDTH)
        out = row_start(product.out, b, t, strides.out, TILE.WIDTH)
        for v in range(0, V, TILE.BLOCK_V):
            x = load_tile(start, v, offs, strides.x.v, inside, V, 0.0, TILE, False, "").to(ACC)
            # A gradient of 0, as that of an ignored row, stays 0 even where the product is inf or NaN.
            x = tl.where(x == 0, 0.0, x * factor)
            store_tile(out, v, offs, strides.out.v, inside, V, x, TILE, False, "")
