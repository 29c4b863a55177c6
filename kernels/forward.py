"""The forward kernel: reads each kept row once, and no logit of an ignored row.

A program that has whole rows stores their results. A program that has a part of a row stores that part's sums, and
`merge_rows` merges the parts. Parts are splits of a launch, or blocks of the vocabulary whose logits exist one after
the other (`first_class`), or both.
"""

import triton
import triton.language as tl

from .device_math import exponent, loss_options, used_logits, weighted
from .sums import row_sums, store_kept, store_part, store_row, target_weight
from .tiles import row_start, rows_of, tile_offsets


@triton.jit(do_not_specialize=["T", "ignore_index"])
def forward_kernel(
    x_ptr,  # (B, T, V)
    probs_ptr,  # (B, T, V) or None
    target_ptr,  # (B * T,) int64
    weight_ptr,  # (V,) or None
    rows_out,  # where `store_row` writes; or None
    parts,  # where `store_part` writes; or None
    N: tl.int64,
    T,
    V,
    place,  # (splits per row, tiles per split, first class, classes)
    strides_x,  # of B, T and V
    strides_probs,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    TILE: tl.constexpr,  # (BLOCK_N, CHUNKS, LANES, WIDTH)
    OPTIONS: tl.constexpr,  # (HAS_SOFT, HAS_SCALE, HAS_SOFTCAP, HAS_STATS)
):
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1] * TILE[2] * TILE[3]
    HAS_STATS: tl.constexpr = OPTIONS[3]
    splits, split_tiles, first_class, classes = place
    soft, curve, _ = loss_options(classes, smoothing, scale, cap, ACC, OPTIONS)

    pid = tl.program_id(0)
    part = 0
    v_start, v_end = 0, V
    if parts is not None:
        part = pid % splits
        pid = pid // splits
        v_start = part * split_tiles * BLOCK_V
        v_end = tl.minimum(v_start + split_tiles * BLOCK_V, V)
    b, t, inside = rows_of(pid, T, BLOCK_N)
    row = b.to(tl.int64) * T + t
    target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    keep = inside & (target != ignore_index)
    if BLOCK_N == 1:
        if target == ignore_index:
            if parts is None:
                store_row(rows_out, row, N, inside, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
            return
    else:
        # A tile without a kept row runs no iteration: not one of its logits is read.
        v_end = tl.where(tl.max(keep.to(tl.int32)) > 0, v_end, v_start)

    x_row = row_start(x_ptr, b, t, strides_x, TILE[3])
    in_range = (target >= 0) & (target < classes)
    local = target - first_class  # counted from first_class, the first of the V classes of x
    if probs_ptr is None:
        probs_row: tl.constexpr = None
        # Loaded first, so that it arrives while the row is read.
        own = keep & in_range & (local >= v_start) & (local < v_end)
        x_target = tl.load(x_row + local * strides_x[2], mask=own, other=0.0)
        w_target = target_weight(weight_ptr, local, own, ACC) * soft[0]
    else:
        probs_row = row_start(probs_ptr, b, t, strides_probs, TILE[3])
    rows = (x_row, strides_x[2], probs_row, strides_probs[2], keep, v_end)
    c, s, r, mass, d, largest, predicted = row_sums(
        rows, v_start, tile_offsets(TILE), (weight_ptr, soft, curve), ACC, TILE, OPTIONS,
        parts is not None or HAS_STATS, HAS_STATS, "",
    )  # fmt: skip
    if probs_ptr is None:
        u_target, _ = used_logits(x_target, curve, ACC, OPTIONS)
        r += weighted(w_target, exponent(u_target, curve[1], c))
        mass += w_target

    predicted += first_class
    if parts is None:
        store_kept(rows_out, row, N, inside, keep, c, s, r, mass, d, predicted)
    else:
        largest *= tl.full((), cap, ACC)
        store_part(parts, row + part * N, keep, c, s, r, mass, d, largest, predicted, HAS_STATS)
    # The assertion comes last, when no values are held in registers: a call in the middle of the kernel makes it spill.
    # A target out of range has not been used as an address, since `own` is false for it.
    tl.device_assert(in_range | (keep == 0), "fused_ignore_ce: target out of range [0, number of classes)")
