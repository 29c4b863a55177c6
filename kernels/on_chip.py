"""Loss and gradient in one launch that reads each logit from device memory once: rows stay on the chip in between.

A program takes one row after the other. Shared memory holds as many pieces of a row as there is room for, registers
hold the row's end, and only what is left in between is read a second time. Pieces are copied to shared memory without
registers, and nobody waits for them: while the gradient of a row is written piece by piece, the pieces of the next kept
row arrive in their places. A thread reads what it has copied itself, and sums stay in the thread until a row's end.

The body of a row consists of whole accesses of 16 bytes. Where rows are not aligned, or end in between, the few logits
before and after the body are its edges, of which a lane has at most one.

This kernel is written in Gluon, in which tensors have explicit layouts. It shares its arithmetic with the others.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .device_math import exponent, loss_options, lowest, used_logits
from .gluon_versions import async_load, barrier, commit_group, reinterpret, wait_group
from .gradient import logit_gradient, loss_gradient
from .one_pass import finish_row
from .structs import (
    GradientRows,
    Gradients,
    LaneSums,
    Logits,
    OnePassStrides,
    OnePassUpstream,
    RowInputs,
    RowOutputs,
    Rows,
    Targets,
)
from .sums import add_logits, merged_lanes, store_ignored, target_weight
from .tiles import row_start

ACCESS = gl.constexpr(16)  # bytes


@gluon.constexpr_function
def layout_of(tile):
    """A thread has one lane of every chunk of a tile."""
    warps = [1, 1, tile.LANES // 32, 1]
    return gl.BlockedLayout([1, tile.CHUNKS, 1, tile.WIDTH], [1, 1, 32, 1], warps, [3, 2, 1, 0])


@gluon.constexpr_function
def linear():
    return gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[3, 2, 1, 0])


@gluon.jit
def lanes_of(TILE: gl.constexpr):
    """The lanes of a tile: (1, 1, LANES, 1)."""
    lane = gl.arange(0, TILE.LANES, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout_of(TILE)))))
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 3)


@gluon.jit
def tile_offsets(TILE: gl.constexpr):
    """The classes of a tile, counted from its first: (1, CHUNKS, LANES, WIDTH)."""
    L: gl.constexpr = layout_of(TILE)
    chunk = gl.arange(0, TILE.CHUNKS, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    chunk = gl.expand_dims(gl.expand_dims(gl.expand_dims(chunk, 0), 2), 3)
    logit = gl.arange(0, TILE.WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
    logit = gl.expand_dims(gl.expand_dims(gl.expand_dims(logit, 0), 1), 2)
    return (chunk * TILE.LANES + lanes_of(TILE)) * TILE.WIDTH + logit


@gluon.jit
def begin_of(x, row, T, strides, TILE: gl.constexpr, HELD: gl.constexpr):
    """A pointer to the first logit of a row."""
    if HELD.HAS_EDGES:
        return row_start(x, row // T, row % T, strides, 1)
    else:
        return row_start(x, row // T, row % T, strides, TILE.WIDTH)


@gluon.jit
def body_of(begin, V, TILE: gl.constexpr, PIECE: gl.constexpr, HELD: gl.constexpr):
    """(its first class, its size, its tiles before what registers keep, the place of that) for the body of a row."""
    head = 0
    if HELD.HAS_EDGES:
        SIZE: gl.constexpr = ACCESS // TILE.WIDTH
        head = gl.minimum((-begin.to(gl.int64) & (ACCESS - 1)).to(gl.int32) // SIZE, V)
    size = (V - head) // TILE.WIDTH * TILE.WIDTH
    if HELD.HAS_REST:
        kept = size - PIECE.BLOCK_V
        tiles = gl.cdiv(kept, TILE.BLOCK_V)
    else:
        tiles = HELD.PIECES * (PIECE.CHUNKS // TILE.CHUNKS)
        kept = HELD.PIECES * PIECE.BLOCK_V
    return head, size, tiles, kept


@gluon.jit
def edge_classes(head, size, EDGE: gl.constexpr):
    """The class before or after the body that each lane has, at most one; for most lanes, one that does not exist."""
    lane = lanes_of(EDGE)
    return gl.where(lane < head, lane, lane + size)


@gluon.jit
def load_end(begin, row, N, V, offs, TILE: gl.constexpr, PIECE: gl.constexpr, EDGE: gl.constexpr, HELD: gl.constexpr):
    """The logits of a row that registers keep, -inf beyond its body; and those of its edges."""
    head, size, _, kept = body_of(begin, V, TILE, PIECE, HELD)
    start = gl.multiple_of(begin + head, ACCESS)
    x_kept = gl.load(start + kept + offs, mask=(offs < size - kept) & (row < N), other=float("-inf"))
    if HELD.HAS_EDGES:
        at = edge_classes(head, size, EDGE)
        x_edge = gl.load(begin + at, mask=(at < V) & (row < N), other=float("-inf"))
    else:
        x_edge = x_kept
    return x_kept, x_edge


@gluon.jit
def gradients_of(rows, x, v, offs, TILE: gl.constexpr, OPTIONS: gl.constexpr, WHOLE: gl.constexpr):
    """The gradients of the logits of a tile that starts at class `v`."""
    u, slope = used_logits(x, rows.options.curve, gl.float32, OPTIONS)
    z = exponent(u, rows.terms.height, rows.terms.c)
    UNMASKED: gl.constexpr = WHOLE or rows.inputs.weight is None
    grad = logit_gradient(rows, u, slope, z, v, offs, gl.float32, TILE, OPTIONS, False, UNMASKED, False)
    return grad.to(rows.outputs.dx.dtype.element_ty)


@gluon.jit
def write_zeros(begin, V, offs, TILE: gl.constexpr, PIECE: gl.constexpr, EDGE: gl.constexpr, HELD: gl.constexpr):
    head, size, _, _ = body_of(begin, V, TILE, PIECE, HELD)
    start = gl.multiple_of(begin + head, ACCESS)
    for v in range(0, size, TILE.BLOCK_V):
        gl.store(start + v + offs, (offs * 0).to(begin.dtype.element_ty), mask=offs < size - v)
    if HELD.HAS_EDGES:
        at = edge_classes(head, size, EDGE)
        gl.store(begin + at, (at * 0).to(begin.dtype.element_ty), mask=at < V)


@gluon.jit
def next_kept(
    row, target, rows_out, dx, targets, N, T, V, strides, ignore_index, offs, TILE: gl.constexpr, PIECE: gl.constexpr,
    EDGE: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """(row, target): a program's first kept row from `row` on. Of ignored ones before it, the results are written."""
    step = gl.num_programs(0)
    while (row < N) & (target == ignore_index):
        store_ignored(rows_out, row, N, row >= 0)
        write_zeros(begin_of(dx, row, T, strides, TILE, HELD), V, offs, TILE, PIECE, EDGE, HELD)
        row += step
        target = gl.load(targets.target + row, mask=row < N, other=0)
    return row, target


@gluon.jit
def in_layout(lanes, LAYOUT: gl.constexpr):
    """The sums of lanes in the layout of another tile, which has the same threads."""
    return LaneSums(
        c=gl.convert_layout(lanes.c, LAYOUT), s=gl.convert_layout(lanes.s, LAYOUT),
        r=gl.convert_layout(lanes.r, LAYOUT), mass=gl.convert_layout(lanes.mass, LAYOUT),
        d=gl.convert_layout(lanes.d, LAYOUT), best=gl.convert_layout(lanes.best, LAYOUT),
        at=gl.convert_layout(lanes.at, LAYOUT),
    )  # fmt: skip


@gluon.jit(do_not_specialize=["N", "T", "ignore_index"])
def on_chip_kernel(
    logits: Logits,  # without probabilities
    gradients: Gradients,  # of x only; every row begins as far from a multiple of 16 bytes as that of x
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
    TILE: gl.constexpr,  # Tile of one row
    PIECE: gl.constexpr,  # Tile that is copied at a time: one or several of the former
    ONE_CHUNK: gl.constexpr,  # Tile of one access a lane
    EDGE: gl.constexpr,  # Tile of one logit a lane
    HELD: gl.constexpr,  # Held
    OPTIONS: gl.constexpr,  # Options
):
    ACC: gl.constexpr = gl.float32
    STATS: gl.constexpr = OPTIONS.HAS_STATS
    TILES: gl.constexpr = PIECE.CHUNKS // TILE.CHUNKS
    options = loss_options(V, smoothing, scale, cap, ACC, OPTIONS)
    offs, offs_piece = tile_offsets(TILE), tile_offsets(PIECE)
    # The same memory by the pieces that are copied, and by the tiles that are read.
    memory = gl.allocate_shared_memory(
        logits.x.dtype.element_ty, [max(HELD.PIECES, 1), 1, PIECE.CHUNKS, PIECE.LANES, PIECE.WIDTH], linear()
    )
    held = reinterpret(
        memory, memory.dtype, [max(HELD.PIECES, 1) * TILES, 1, TILE.CHUNKS, TILE.LANES, TILE.WIDTH], linear()
    )
    step = gl.num_programs(0)

    row = gl.program_id(0)
    target = gl.load(targets.target + row, mask=row < N, other=0)
    row, target = next_kept(
        row, target, rows_out, gradients.dx, targets, N, T, V, strides.dx, ignore_index, offs, TILE, PIECE, EDGE, HELD
    )
    begin = begin_of(logits.x, row, T, strides.x, TILE, HELD)
    head, _, _, _ = body_of(begin, V, TILE, PIECE, HELD)
    start = gl.multiple_of(begin + head, ACCESS)
    for i in range(HELD.PIECES):
        if row < N:
            async_load(memory.index(i), start + i * PIECE.BLOCK_V + offs_piece)
        commit_group()
    x_kept, x_edge = load_end(begin, row, N, V, offs_piece, TILE, PIECE, EDGE, HELD)
    while row < N:
        everywhere = row >= 0
        begin = begin_of(logits.x, row, T, strides.x, TILE, HELD)
        dx = begin_of(gradients.dx, row, T, strides.dx, TILE, HELD)
        head, size, tiles, kept = body_of(begin, V, TILE, PIECE, HELD)
        start, dx_start = gl.multiple_of(begin + head, ACCESS), gl.multiple_of(dx + head, ACCESS)
        upcoming = gl.load(targets.target + row + step, mask=row + step < N, other=0)
        own = (target >= 0) & (target < V)
        x_target = gl.load(begin + target, mask=own, other=0.0)
        w_target = target_weight(targets.weight, target, own, ACC)
        g = loss_gradient(upstream, strides.upstream, row, everywhere, ACC)

        w, end = targets.weight, head + size
        inputs = RowInputs(x=begin, stride_xv=1, probs=None, stride_pv=0, weight=w, keep=everywhere, v_end=V)
        of_body = RowInputs(x=begin, stride_xv=1, probs=None, stride_pv=0, weight=w, keep=everywhere, v_end=end)
        FIRST: gl.constexpr = layout_of(TILE)
        zero, at = gl.full([1, 1, TILE.LANES, 1], 0.0, ACC, FIRST), gl.full([1, 1, TILE.LANES, 1], 0, gl.int32, FIRST)
        lanes = LaneSums(c=zero + lowest(zero), s=zero, r=zero, mass=zero, d=zero, best=zero + float("-inf"), at=at)
        if HELD.HAS_EDGES:
            edge = edge_classes(head, size, EDGE)
            lanes = in_layout(lanes, layout_of(EDGE))
            lanes = add_logits(lanes, x_edge, inputs, 0, edge, options, ACC, EDGE, OPTIONS, False, STATS)
            # `first_of_largest` looks for the class at this offset.
            lanes = LaneSums(
                c=lanes.c, s=lanes.s, r=lanes.r, mass=lanes.mass, d=lanes.d, best=lanes.best,
                at=edge - lanes_of(EDGE) * TILE.WIDTH,
            )  # fmt: skip
            lanes = in_layout(lanes, FIRST)
        for piece in range(HELD.PIECES):
            commit_group()  # an empty group, so that `wait_group` counts as many younger groups for each piece
            wait_group(HELD.PIECES)
            barrier()  # Without it, the compiler would put one into the loop.
            for i in range(piece * TILES, (piece + 1) * TILES):
                x, v = held.index(i).load(layout_of(TILE)), head + i * TILE.BLOCK_V
                lanes = add_logits(lanes, x, of_body, v, offs, options, ACC, TILE, OPTIONS, True, STATS)
        if HELD.HAS_REST:
            weight, end = targets.weight, head + kept
            of_rest = RowInputs(
                x=begin, stride_xv=1, probs=None, stride_pv=0, weight=weight, keep=everywhere, v_end=end
            )
            for i in range(HELD.PIECES * TILES, tiles):
                v = i * TILE.BLOCK_V
                x = gl.load(start + v + offs, offs < kept - v, float("-inf"), eviction_policy="evict_last")
                lanes = add_logits(lanes, x, of_rest, head + v, offs, options, ACC, TILE, OPTIONS, False, STATS)
        lanes = in_layout(lanes, layout_of(PIECE))
        lanes = add_logits(lanes, x_kept, of_body, head + kept, offs_piece, options, ACC, PIECE, OPTIONS, False, STATS)
        zero = gl.convert_layout(zero, layout_of(ONE_CHUNK))
        sums = merged_lanes(
            lanes, inputs, 0, offs_piece, tile_offsets(ONE_CHUNK), zero, options, ACC, PIECE, OPTIONS, STATS
        )
        terms = finish_row(
            rows_out, row, N, sums, x_target, target, w_target, g, upstream, strides.upstream, everywhere, z_loss,
            options, ACC, OPTIONS,
        )  # fmt: skip
        outputs = RowOutputs(dx=dx, stride_dxv=1, dprobs=None, stride_dpv=0, inside=everywhere)
        rows = GradientRows(inputs=inputs, outputs=outputs, terms=terms, options=options)

        next_row, next_target = next_kept(
            row + step,
            upcoming,
            rows_out,
            gradients.dx,
            targets,
            N,
            T,
            V,
            strides.dx,
            ignore_index,
            offs,
            TILE,
            PIECE,
            EDGE,
            HELD,
        )
        next_begin = begin_of(logits.x, next_row, T, strides.x, TILE, HELD)
        next_head, _, _, _ = body_of(next_begin, V, TILE, PIECE, HELD)
        next_start = gl.multiple_of(next_begin + next_head, ACCESS)
        gl.store(
            dx_start + kept + offs_piece, gradients_of(rows, x_kept, head + kept, offs_piece, PIECE, OPTIONS, False),
            mask=offs_piece < size - kept, eviction_policy="evict_first",
        )  # fmt: skip
        if HELD.HAS_EDGES:
            gl.store(dx + edge, gradients_of(rows, x_edge, 0, edge, EDGE, OPTIONS, False), mask=edge < V)
        x_kept, x_edge = load_end(next_begin, next_row, N, V, offs_piece, TILE, PIECE, EDGE, HELD)
        if HELD.HAS_REST:
            for j in range(HELD.PIECES * TILES, tiles):  # What was read last comes first: the cache may have it.
                v = (tiles - 1 - j + HELD.PIECES * TILES) * TILE.BLOCK_V
                x = gl.load(start + v + offs, offs < kept - v, 0.0, eviction_policy="evict_first")
                grad = gradients_of(rows, x, head + v, offs, TILE, OPTIONS, False)
                gl.store(dx_start + v + offs, grad, offs < kept - v, eviction_policy="evict_first")
        for piece in range(HELD.PIECES):
            barrier()  # as above
            for i in range(piece * TILES, (piece + 1) * TILES):
                v = i * TILE.BLOCK_V
                grad = gradients_of(rows, held.index(i).load(layout_of(TILE)), head + v, offs, TILE, OPTIONS, True)
                gl.store(dx_start + v + offs, grad, eviction_policy="evict_first")
            if next_row < N:
                async_load(memory.index(piece), next_start + piece * PIECE.BLOCK_V + offs_piece)
            commit_group()
        # The target's gradient takes the place of what was written there.
        u, slope = used_logits(x_target, options.curve, ACC, OPTIONS)
        z = exponent(u, terms.height, terms.c)
        grad = logit_gradient(rows, u, slope, z, 0, target, ACC, TILE, OPTIONS, False, False, True)
        barrier()
        gl.store(dx + target, grad.to(dx.dtype.element_ty), mask=own)
        gl.device_assert(own, "fused_ignore_ce: target out of range [0, number of classes)")
        row, target = next_row, next_target
