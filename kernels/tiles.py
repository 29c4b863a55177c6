"""Where a program's rows and tiles lie in memory."""

import triton
import triton.language as tl


@triton.jit
def rows_of(pid, T, BLOCK_N: tl.constexpr):
    """(b, t, whether it exists) of each row of a program, of rows in `T`s of which no program has of two."""
    if BLOCK_N == 1:
        return pid // T, pid % T, tl.full((), True, tl.int1)
    else:
        blocks_t = tl.cdiv(T, BLOCK_N)
        t = (pid % blocks_t) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
        return pid // blocks_t, t, t < T


@triton.jit
def row_start(ptr, b, t, strides, WIDTH: tl.constexpr):
    """The first logit of each row of a tensor (B, T, V), whose rows lie WIDTH logits apart, or a multiple of that."""
    offset = b.to(tl.int64) * strides[0] + t.to(tl.int64) * strides[1]
    # Says so to the compiler, which knows only of strides that are multiples of 16.
    return ptr + offset // WIDTH * WIDTH


@triton.jit
def tile_offsets(TILE: tl.constexpr):
    """The classes of a tile, counted from its first: (1, CHUNKS * LANES, WIDTH)."""
    ACCESSES: tl.constexpr = TILE[1] * TILE[2]
    WIDTH: tl.constexpr = TILE[3]
    return tl.arange(0, ACCESSES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def tile_pointers(start, v, offs, stride_v):
    """Pointers to classes `v + offs` of rows that start at `start`."""
    return start + tl.cast(v, tl.int64) * stride_v + offs.to(tl.int64) * stride_v


@triton.jit
def load_tile(
    start, v, offs, stride_v, keep, v_end, other, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr
):
    """Classes `v + offs` of the kept rows, `other` where there are none. A whole tile of one row needs no mask."""
    ptrs = tile_pointers(start, v, offs, stride_v)
    if BLOCK_N == 1 and WHOLE:
        return tl.load(ptrs, eviction_policy=EVICT)
    elif BLOCK_N == 1:
        return tl.load(ptrs, mask=offs < v_end - v, other=other, eviction_policy=EVICT)
    else:
        return tl.load(ptrs, mask=keep & (offs < v_end - v), other=other, eviction_policy=EVICT)


@triton.jit
def store_tile(
    start, v, offs, stride_v, inside, v_end, value, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr
):
    """The counterpart of `load_tile`, rounding to the tensor's dtype."""
    ptrs = tile_pointers(start, v, offs, stride_v)
    value = value.to(start.dtype.element_ty)
    if BLOCK_N == 1 and WHOLE:
        tl.store(ptrs, value, eviction_policy=EVICT)
    elif BLOCK_N == 1:
        tl.store(ptrs, value, mask=offs < v_end - v, eviction_policy=EVICT)
    else:
        tl.store(ptrs, value, mask=inside & (offs < v_end - v), eviction_policy=EVICT)


@triton.jit
def load_weights(weight_ptr, v, offs, v_end, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Class weights of a tile, in all of its rows: shaped and accessed as its logits are, they meet in one thread.

    Otherwise, they would change threads in every iteration. So nothing may be known of the weights' alignment where
    nothing is of the logits': the sign of `v_end` is 0, but the compiler does not see that.
    """
    place = v + offs + tl.zeros((BLOCK_N, 1, 1), tl.int32)
    if WIDTH == 1:
        place += v_end >> 31
    return tl.load(weight_ptr + place, mask=offs < v_end - v, other=0.0)
