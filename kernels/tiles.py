"""Where a program's rows and tiles lie in memory."""

import triton
import triton.language as tl


@triton.jit
def rows_of(pid, T, BLOCK_N: tl.constexpr):
    """(b, t, whether the row exists) for each row of a program; all rows of a program have the same b."""
    if BLOCK_N == 1:
        return pid // T, pid % T, tl.full((), True, tl.int1)
    else:
        blocks_t = tl.cdiv(T, BLOCK_N)
        t = (pid % blocks_t) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
        return pid // blocks_t, t, t < T


@triton.jit
def row_start(ptr, b, t, strides, WIDTH: tl.constexpr):
    """Pointers to the first logits of rows of a tensor (B, T, V); every row begins at a multiple of WIDTH logits."""
    offset = b.to(tl.int64) * strides.b + t.to(tl.int64) * strides.t
    # Tells the compiler of these multiples; by itself, it only notices strides that are multiples of 16.
    return ptr + offset // WIDTH * WIDTH


@triton.jit
def tile_offsets(TILE: tl.constexpr, CHUNKS: tl.constexpr):
    """The classes of a tile of so many chunks, counted from its first: (1, CHUNKS * LANES, WIDTH)."""
    accesses = tl.arange(0, CHUNKS * TILE.LANES)[None, :, None]
    return accesses * TILE.WIDTH + tl.arange(0, TILE.WIDTH)[None, None, :]


@triton.jit
def tile_pointers(start, v, offs, stride_v):
    """Pointers to classes `v + offs` of rows that start at `start`."""
    return start + tl.cast(v, tl.int64) * stride_v + offs.to(tl.int64) * stride_v


@triton.jit
def load_tile(
    start, v, offs, stride_v, keep, v_end, other, TILE: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr
):
    """Loads classes `v + offs` of kept rows, and `other` elsewhere. A whole tile of one row needs no mask."""
    ptrs = tile_pointers(start, v, offs, stride_v)
    if TILE.BLOCK_N == 1 and WHOLE:
        return tl.load(ptrs, eviction_policy=EVICT)
    elif TILE.BLOCK_N == 1:
        return tl.load(ptrs, mask=offs < v_end - v, other=other, eviction_policy=EVICT)
    else:
        return tl.load(ptrs, mask=keep & (offs < v_end - v), other=other, eviction_policy=EVICT)


@triton.jit
def store_tile(
    start, v, offs, stride_v, inside, v_end, value, TILE: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr
):
    """The counterpart of `load_tile`, rounding to the tensor's dtype."""
    ptrs = tile_pointers(start, v, offs, stride_v)
    value = value.to(start.dtype.element_ty)
    if TILE.BLOCK_N == 1 and WHOLE:
        tl.store(ptrs, value, eviction_policy=EVICT)
    elif TILE.BLOCK_N == 1:
        tl.store(ptrs, value, mask=offs < v_end - v, eviction_policy=EVICT)
    else:
        tl.store(ptrs, value, mask=inside & (offs < v_end - v), eviction_policy=EVICT)


@triton.jit
def load_weights(weight_ptr, v, offs, v_end, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Loads the class weights of a tile in the layout of its logits, so that weight and logit meet in one thread.

    In another layout, the weights would be moved between threads in every iteration. So where the compiler does not
    know the alignment of the logits, it must not know that of the weights either. Adding the sign of `v_end`, which is
    0, hides it, since the compiler does not know that sign.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    place = v + offs
    if BLOCK_N > 1:
        place += tl.zeros((BLOCK_N, 1, 1), tl.int32)
    if TILE.WIDTH == 1:
        place += v_end >> 31
    if WHOLE:
        return tl.load(weight_ptr + place)
    else:
        return tl.load(weight_ptr + place, mask=offs < v_end - v, other=0.0)
