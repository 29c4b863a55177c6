"""Loss and gradient in one launch, each logit read from device memory once: a row stays on the chip in between."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .device_math import exponent, loss_options, lowest, used_logits
from .gluon_versions import async_load, barrier, commit_group, wait_group
from .gradient import logit_gradient, loss_gradient
from .one_pass import finish_row
from .structs import GradientRows, LaneSums, RowInputs, RowOutputs, Tile
from .sums import add_logits, merged_lanes, store_ignored, target_weight
from .tiles import row_start


@gluon.jit
def tile_offsets(TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """The classes of a tile, counted from its first: (1, CHUNKS, LANES, WIDTH)."""
    OF_CHUNK: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    OF_LANE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    OF_WORD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    chunk = gl.arange(0, TILE.CHUNKS, layout=OF_CHUNK)
    lane = gl.arange(0, TILE.LANES, layout=OF_LANE)
    logit = gl.arange(0, TILE.WIDTH, layout=OF_WORD)
    chunk = gl.expand_dims(gl.expand_dims(gl.expand_dims(chunk, 0), 2), 3)
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 3)
    logit = gl.expand_dims(gl.expand_dims(gl.expand_dims(logit, 0), 1), 2)
    return (chunk * TILE.LANES + lane) * TILE.WIDTH + logit


@gluon.jit
def next_kept(
    row, target, rows_out, gradients, targets, N, T, V, strides, ignore_index, offs, TILE: gl.constexpr
):
    """The first kept row of a program from `row` on, whose target is `target`; ignored rows before it are written."""
    step = gl.num_programs(0)
    while (row < N) & (target == ignore_index):
        store_ignored(rows_out, row, N, row >= 0)
        dx = row_start(gradients.dx, row // T, row % T, strides.dx, TILE.WIDTH)
        zeros = (offs * 0).to(gradients.dx.dtype.element_ty)
        for v in range(0, V, TILE.BLOCK_V):
            gl.store(dx + v + offs, zeros, mask=offs < V - v)
        row += step
        target = gl.load(targets.target + row, mask=row < N, other=0)
    return row, target


@gluon.jit
def tile_of(held, x_row, i, offs, L: gl.constexpr, TILE: gl.constexpr, HELD: gl.constexpr, EVICT: gl.constexpr):
    """Tile `i` of a row, from shared memory or, if that does not hold it, from device memory."""
    if HELD.HAS_REST:
        if i < HELD.PIECES * (HELD.PIECE.CHUNKS // TILE.CHUNKS):
            x = held.index(i).load(L)
        else:
            x = gl.load(x_row + i * TILE.BLOCK_V + offs, eviction_policy=EVICT)
    else:
        x = held.index(i).load(L)
    return x


@gluon.jit
def write_tile(rows, x, v, offs, TILE: gl.constexpr, OPTIONS: gl.constexpr, WHOLE: gl.constexpr):
    """Writes the gradients of a tile of logits that starts at class `v`."""
    ACC: gl.constexpr = gl.float32
    u, slope = used_logits(x, rows.options.curve, ACC, OPTIONS)
    z = exponent(u, rows.terms.height, rows.terms.c)
    grad = logit_gradient(rows, u, slope, z, v, offs, ACC, TILE, OPTIONS, False, True, False)
    grad = grad.to(rows.outputs.dx.dtype.element_ty)
    if WHOLE:
        gl.store(rows.outputs.dx + v + offs, grad, eviction_policy="evict_first")
    else:
        gl.store(rows.outputs.dx + v + offs, grad, mask=offs < rows.inputs.v_end - v, eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["N", "T", "ignore_index"])
def on_chip_kernel(
    logits,  # Logits, without probabilities
    gradients,  # Gradients, of x only
    targets,  # Targets
    rows_out,  # Rows
    upstream,  # OnePassUpstream
    N,  # B * T
    T,
    V,
    strides,  # OnePassStrides
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    z_loss: tl.float64,
    TILE: gl.constexpr,  # Tile of one row
    HELD: gl.constexpr,  # Held
    OPTIONS: gl.constexpr,  # Options
):
    ACC: gl.constexpr = gl.float32
    WARPS: gl.constexpr = gl.num_warps()
    KEPT_TILE: gl.constexpr = HELD.KEPT
    TILES: gl.constexpr = HELD.PIECE.CHUNKS // TILE.CHUNKS  # of a piece
    L: gl.constexpr = gl.BlockedLayout([1, TILE.CHUNKS, 1, TILE.WIDTH], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    K: gl.constexpr = gl.BlockedLayout([1, HELD.KEPT.CHUNKS, 1, TILE.WIDTH], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    P: gl.constexpr = gl.BlockedLayout([1, HELD.PIECE.CHUNKS, 1, TILE.WIDTH], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    ONE: gl.constexpr = gl.BlockedLayout([1, 1, 1, TILE.WIDTH], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[3, 2, 1, 0])
    options = loss_options(V, smoothing, scale, cap, ACC, OPTIONS)
    offs = tile_offsets(TILE, L)
    offs_kept = tile_offsets(KEPT_TILE, K)
    offs_piece = tile_offsets(HELD.PIECE, P)
    # Shared memory by tiles, as they are read, and by what is copied at a time.
    memory = gl.allocate_shared_memory(
        logits.x.dtype.element_ty, [max(HELD.PIECES, 1), 1, HELD.PIECE.CHUNKS, TILE.LANES, TILE.WIDTH], LINEAR
    )
    held = memory._reinterpret(
        memory.dtype, [max(HELD.PIECES, 1) * TILES, 1, TILE.CHUNKS, TILE.LANES, TILE.WIDTH], LINEAR
    )
    HELD_TILES: gl.constexpr = HELD.PIECES * TILES
    tiles = HELD_TILES
    if HELD.HAS_REST:
        tiles += (V - HELD.KEPT.BLOCK_V + TILE.BLOCK_V - 1) // TILE.BLOCK_V - HELD_TILES
    kept = tiles * TILE.BLOCK_V
    step = gl.num_programs(0)

    first = gl.program_id(0)
    target = gl.load(targets.target + first, mask=first < N, other=0)
    row, target = next_kept(first, target, rows_out, gradients, targets, N, T, V, strides, ignore_index, offs, TILE)
    x_row = row_start(logits.x, row // T, row % T, strides.x, TILE.WIDTH)
    if row < N:
        for i in range(HELD.PIECES):
            async_load(memory.index(i), x_row + i * HELD.PIECE.BLOCK_V + offs_piece)
            commit_group()
    inside_kept = offs_kept < V - kept
    x_kept = gl.load(x_row + kept + offs_kept, mask=inside_kept & (row < N), other=float("-inf"))
    while row < N:
        everywhere = row >= 0
        x_row = row_start(logits.x, row // T, row % T, strides.x, TILE.WIDTH)
        dx_row = row_start(gradients.dx, row // T, row % T, strides.dx, TILE.WIDTH)
        upcoming = gl.load(targets.target + row + step, mask=row + step < N, other=0)
        own = (target >= 0) & (target < V)
        x_target = gl.load(x_row + target, mask=own, other=0.0)
        w_target = target_weight(targets.weight, target, own, ACC)
        g = loss_gradient(upstream, strides.upstream, row, everywhere, ACC)
        inputs = RowInputs(
            x=x_row, stride_xv=1, probs=None, stride_pv=0, weight=targets.weight, keep=everywhere, v_end=V
        )
        zero = gl.full([1, 1, TILE.LANES, 1], 0.0, ACC, L)
        at = gl.full([1, 1, TILE.LANES, 1], 0, gl.int32, L)
        lanes = LaneSums(c=zero + lowest(zero), s=zero, r=zero, mass=zero, d=zero, best=zero + float("-inf"), at=at)
        barrier()
        for i in range(tiles):
            if i % TILES == 0:
                commit_group()  # empty, so that of every piece the same number of groups is younger
                wait_group(HELD.PIECES)
            x = tile_of(held, x_row, i, offs, L, TILE, HELD, "evict_last")
            lanes = add_logits(
                lanes, x, inputs, i * TILE.BLOCK_V, offs, options, ACC, TILE, OPTIONS, True, OPTIONS.HAS_STATS
            )
        in_kept = LaneSums(
            c=gl.convert_layout(lanes.c, K), s=gl.convert_layout(lanes.s, K), r=gl.convert_layout(lanes.r, K),
            mass=gl.convert_layout(lanes.mass, K), d=gl.convert_layout(lanes.d, K),
            best=gl.convert_layout(lanes.best, K), at=gl.convert_layout(lanes.at, K),
        )  # fmt: skip
        in_kept = add_logits(
            in_kept, x_kept, inputs, kept, offs_kept, options, ACC, KEPT_TILE, OPTIONS, False, OPTIONS.HAS_STATS
        )
        zero_one = gl.convert_layout(zero, ONE)
        sums = merged_lanes(
            in_kept, inputs, 0, offs_kept, tile_offsets(TILE.ONE_CHUNK, ONE), zero_one, options, ACC, KEPT_TILE, OPTIONS,
            OPTIONS.HAS_STATS,
        )  # fmt: skip
        terms = finish_row(
            rows_out, row, N, sums, x_target, target, w_target, g, upstream, strides.upstream, everywhere, z_loss,
            options, ACC, OPTIONS,
        )  # fmt: skip
        outputs = RowOutputs(dx=dx_row, stride_dxv=1, dprobs=None, stride_dpv=0, inside=everywhere)
        rows = GradientRows(inputs=inputs, outputs=outputs, terms=terms, options=options)
        next_row, next_target = next_kept(
            row + step, upcoming, rows_out, gradients, targets, N, T, V, strides, ignore_index, offs, TILE
        )
        x_next = row_start(logits.x, next_row // T, next_row % T, strides.x, TILE.WIDTH)
        write_tile(rows, x_kept, kept, offs_kept, KEPT_TILE, OPTIONS, False)
        x_kept = gl.load(x_next + kept + offs_kept, mask=inside_kept & (next_row < N), other=float("-inf"))
        for j in range(tiles):
            i = j
            if HELD.HAS_REST:  # from its end, which the cache may still have
                i = tl.where(j < tiles - HELD_TILES, tiles - 1 - j, j - (tiles - HELD_TILES))
            x = tile_of(held, x_row, i, offs, L, TILE, HELD, "evict_first")
            write_tile(rows, x, i * TILE.BLOCK_V, offs, TILE, OPTIONS, True)
            if i % TILES == TILES - 1:
                if (next_row < N) & (i < HELD_TILES):
                    async_load(memory.index(i // TILES), x_next + i // TILES * HELD.PIECE.BLOCK_V + offs_piece)
                if i < HELD_TILES:
                    commit_group()
        # The target's gradient takes the place of what was just written there.
        u, slope = used_logits(x_target, options.curve, ACC, OPTIONS)
        z = exponent(u, terms.height, terms.c)
        grad = logit_gradient(rows, u, slope, z, 0, target, ACC, TILE, OPTIONS, False, False, True)
        barrier()
        gl.store(dx_row + target, grad.to(gradients.dx.dtype.element_ty), mask=own)
        gl.device_assert(own, "fused_ignore_ce: target out of range [0, number of classes)")
        row, target = next_row, next_target
