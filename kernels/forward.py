"""The forward kernel: reads each kept row once, and no logit of an ignored row.

A program that has whole rows stores their results. A program that has a part of a row stores that part's sums, and
`merge_rows` merges the parts. Parts are splits of a launch, or blocks of the vocabulary whose logits exist one after
the other (`first_class`), or both.
"""

import triton
import triton.language as tl

from .device_math import exponent, loss_options, row_curve, used_logits, weighted
from .structs import ForwardStrides, Logits, Part, Place, RowInputs, Rows, RowSums, Targets
from .sums import row_sums, store_ignored, store_kept, store_part, target_weight
from .tiles import row_start, rows_of, tile_offsets


@triton.jit(do_not_specialize=["T", "ignore_index"])
def forward_kernel(
    logits: Logits,
    targets: Targets,
    rows_out: Rows,  # None if sums of a part are stored
    part_out: Part,  # None if the results of rows are stored
    N: tl.int64,  # B * T
    T,
    V,
    place: Place,
    strides: ForwardStrides,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    TILE: tl.constexpr,  # Tile
    OPTIONS: tl.constexpr,  # Options
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    options = loss_options(place.classes, smoothing, scale, cap, ACC, OPTIONS)

    pid = tl.program_id(0)
    part = 0
    v_start, v_end = 0, V
    if part_out is not None:
        part = pid % place.splits
        pid = pid // place.splits
        v_start = part * place.split_tiles * BLOCK_V
        v_end = tl.minimum(v_start + place.split_tiles * BLOCK_V, V)
    b, t, inside = rows_of(pid, T, TILE.BLOCK_N)
    row = b.to(tl.int64) * T + t
    target = tl.load(targets.target + row, mask=inside, other=ignore_index)
    keep = inside & (target != ignore_index)
    if TILE.BLOCK_N == 1:
        if target == ignore_index:
            if part_out is None:
                store_ignored(rows_out, row, N, inside)
            return
    else:
        # A tile without a kept row runs no iteration: not one of its logits is read.
        v_end = tl.where(tl.max(keep.to(tl.int32)) > 0, v_end, v_start)

    x_row = row_start(logits.x, b, t, strides.x, TILE.WIDTH)
    in_range = (target >= 0) & (target < place.classes)
    local = target - place.first_class  # counted from first_class, the first of the V classes of x
    if logits.probs is None:
        probs_row: tl.constexpr = None
        # Loaded first, so that it arrives while the row is read.
        own = keep & in_range & (local >= v_start) & (local < v_end)
        x_target = tl.load(x_row + local * strides.x.v, mask=own, other=0.0)
        w_target = target_weight(targets.weight, local, own, ACC) * options.smoothing.confidence
    else:
        probs_row = row_start(logits.probs, b, t, strides.probs, TILE.WIDTH)
    inputs = RowInputs(
        x=x_row, stride_xv=strides.x.v, probs=probs_row, stride_pv=strides.probs.v, weight=targets.weight, keep=keep,
        v_end=v_end,
    )  # fmt: skip
    HAS_BEST: tl.constexpr = part_out is not None or OPTIONS.HAS_STATS
    sums = row_sums(inputs, v_start, tile_offsets(TILE, TILE.CHUNKS), options, ACC, TILE, OPTIONS, HAS_BEST, "")
    r, mass = sums.r, sums.mass
    if logits.probs is None:
        u_target, _ = used_logits(x_target, options.curve, ACC, OPTIONS)
        height, _ = row_curve(options.curve, sums.far)
        r += weighted(w_target, exponent(u_target, height * 0.25, sums.c * 0.25))
        mass += w_target

    predicted = sums.predicted + place.first_class
    sums = RowSums(
        c=sums.c, s=sums.s, r=r, mass=mass, d=sums.d, largest=sums.largest, predicted=predicted, far=sums.far
    )
    if part_out is None:
        store_kept(rows_out, row, N, inside, keep, sums, options.curve)
    else:
        store_part(part_out, row + part * N, keep, sums, OPTIONS.HAS_STATS)
    # The assertion comes last, when no values are held in registers: a call in the middle of the kernel makes it spill.
    # A target out of range has not been used as an address, since `own` is false for it.
    tl.device_assert(in_range | (keep == 0), "fused_ignore_ce: target out of range [0, number of classes)")
