"""The kernels of distillation: losses of rows, with their gradient if the losses' factors are known; and backward.

A program has one row at a time. An ignored row is not read; its results are zeros, as is its gradient.
"""

import triton
import triton.language as tl

from .device_math import LN2, capped_curve, exponent, fused_multiply_add, row_curve, used_logits
from .distillation_structs import KnownRow, Normaliser, PairLogits, PairRows, PairStrides, Side
from .divergence import pair_sums
from .divergence_gradient import write_pair_gradient
from .gradient import write_zeros
from .structs import Gradients, LossOptions, Place, RowInputs
from .sums import cross_entropy, signed
from .tiles import tile_offsets


@triton.jit
def row_at(ptr, row, stride, WIDTH: tl.constexpr):
    """A pointer to the first logit of a row, which begins at a multiple of WIDTH logits."""
    return ptr + row * stride // WIDTH * WIDTH


@triton.jit
def side_of(start, stride_v, v_end, scale, cap, ACC: tl.constexpr):
    """One side's `Side`: a row, and how its logits are used."""
    NOTHING: tl.constexpr = None
    inputs = RowInputs(
        x=start, stride_xv=stride_v, probs=NOTHING, stride_pv=0, weight=NOTHING, keep=tl.full((), True, tl.int1),
        v_end=v_end,
    )  # fmt: skip
    return Side(inputs=inputs, options=LossOptions(smoothing=NOTHING, curve=capped_curve(scale, cap, ACC)))


@triton.jit
def store_pair_row(rows, row, N, loss, lse, known_row, predicted, entropy, APART: tl.constexpr):
    """Stores the results of a kept row into `PairRows`."""
    tl.store(rows.loss + row, loss)
    if rows.saved is not None:
        q, p, one = known_row.q, known_row.p, known_row.ones
        tl.store(rows.saved + row, q.c)
        tl.store(rows.saved + N + row, signed(q.s, q.far))
        tl.store(rows.saved + 2 * N + row, p.c)
        tl.store(rows.saved + 3 * N + row, signed(p.s, p.far))
        tl.store(rows.saved + 4 * N + row, known_row.mean)
        if APART:
            tl.store(rows.saved + 5 * N + row, one.c)
            tl.store(rows.saved + 6 * N + row, signed(one.s, one.far))
    if rows.lse is not None:
        tl.store(rows.lse + row, lse)
        tl.store(rows.predicted + row, predicted)
        tl.store(rows.entropy + row, entropy)


@triton.jit
def loaded_normaliser(ptr, N):
    """A `Normaliser` that forward has stored."""
    c, s = tl.load(ptr), tl.load(ptr + N)
    return Normaliser(c=c, s=tl.abs(s), far=s < 0)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def distillation_kernel(
    logits: PairLogits,
    gradients: Gradients,  # of x only; None for results alone
    target_ptr,  # (N,) int64
    rows_out: PairRows,
    scale_ptr,  # (N,) the factors of the losses in the gradient; or None
    N,
    V,
    strides: PairStrides,
    ignore_index: tl.int64,
    scale: tl.float64,
    cap: tl.float64,
    cap_at_temperature: tl.float64,
    teacher_scale: tl.float64,
    teacher_cap: tl.float64,  # at the temperature
    beta: tl.float64,
    share: tl.float64,  # of the divergence in the loss
    hard: tl.float64,  # of the cross entropy
    TILE: tl.constexpr,  # Tile of one row
    OPTIONS: tl.constexpr,  # Options of the student
    TEACHER: tl.constexpr,  # Options
    MIX: tl.constexpr,  # Mix
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    EVICT: tl.constexpr = "" if gradients is None and MIX.KIND != "jsd" else "evict_last"
    beta, share, hard = tl.full((), beta, ACC), tl.full((), share, ACC), tl.full((), hard, ACC)
    for at in range(tl.program_id(0), N, tl.num_programs(0)):
        # Adds 0, so that no register keeps an offset from one row to the next, see `one_pass_kernel`.
        offs = tile_offsets(TILE, TILE.CHUNKS) + (tl.cast(at, tl.int32) >> 31) * TILE.BLOCK_V
        row = tl.cast(at, tl.int64)
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            ignored = Normaliser(c=0.0, s=0.0, far=target != target)
            nothing = KnownRow(q=ignored, p=ignored, ones=ignored, mean=0.0)
            store_pair_row(rows_out, row, N, 0.0, 0.0, nothing, 0, 0.0, MIX.APART)
            if gradients is not None:
                dx_row = row_at(gradients.dx, row, strides.dx_n, TILE.WIDTH)
                write_zeros(dx_row, strides.dx_v, 0, V, offs, TILE)
        else:
            x_row = row_at(logits.x, row, strides.x_n, TILE.WIDTH)
            teacher_row = row_at(logits.teacher, row, strides.teacher_n, TILE.WIDTH)
            student = side_of(x_row, strides.x_v, V, scale, cap_at_temperature, ACC)
            teacher = side_of(teacher_row, strides.teacher_v, V, teacher_scale, teacher_cap, ACC)
            ones = side_of(x_row, strides.x_v, V, scale, cap, ACC)
            own = (target >= 0) & (target < V)
            x_target = tl.load(x_row + target * strides.x_v, mask=own & MIX.HARD, other=0.0)
            q, p, one, bits, mean, d, predicted = pair_sums(
                student, teacher, ones, offs, beta, ACC, TILE, OPTIONS, TEACHER, MIX, EVICT
            )
            if MIX.ONE_CLASS:  # exactly 0, but NaN for a logit of NaN
                bits *= 0.0
            loss = share * (bits * LN2)
            height, nats = row_curve(ones.options.curve, one.far)
            if MIX.HARD:
                u_target, _ = used_logits(x_target, ones.options.curve, ACC, OPTIONS)
                r = exponent(u_target, height * 0.25, one.c * 0.25)
                loss += hard * cross_entropy(one.s, r, tl.full((), 1.0, ACC), one.far, nats)
            log_s = tl.log2(one.s)
            lse, entropy = fused_multiply_add(one.c, nats, log_s * LN2), (log_s - d / one.s) * LN2
            found = KnownRow(q=q, p=p, ones=one, mean=mean)
            store_pair_row(rows_out, row, N, loss, lse, found, predicted, entropy, MIX.APART)
            if gradients is not None:
                upstream = tl.load(scale_ptr + row * strides.scale_n).to(ACC)
                dx_row = row_at(gradients.dx, row, strides.dx_n, TILE.WIDTH)
                write_pair_gradient(
                    student, teacher, ones, found, upstream, 0, dx_row, strides.dx_v, target, offs, beta, share, hard,
                    ACC, TILE, OPTIONS, TEACHER, MIX, "evict_first",
                )  # fmt: skip
            if MIX.HARD:
                tl.device_assert(own, "fused_ignore_ce: target out of range [0, number of classes)")


@triton.jit(do_not_specialize=["N", "ignore_index"])
def distillation_backward_kernel(
    logits: PairLogits,
    gradients: Gradients,  # of x only
    target_ptr,  # (N,) int64
    saved_ptr,  # (7, N), see `PairRows`
    scale_ptr,  # (N,) the gradients of the losses
    N: tl.int64,
    V,
    place: Place,
    strides: PairStrides,
    ignore_index: tl.int64,
    scale: tl.float64,
    cap: tl.float64,
    cap_at_temperature: tl.float64,
    teacher_scale: tl.float64,
    teacher_cap: tl.float64,
    beta: tl.float64,
    share: tl.float64,
    hard: tl.float64,
    TILE: tl.constexpr,
    OPTIONS: tl.constexpr,
    TEACHER: tl.constexpr,
    MIX: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if logits.x.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    beta, share, hard = tl.full((), beta, ACC), tl.full((), share, ACC), tl.full((), hard, ACC)
    offs = tile_offsets(TILE, TILE.CHUNKS)
    pid = tl.program_id(0)
    row = (pid // place.splits).to(tl.int64)
    v_start = (pid % place.splits) * place.split_tiles * BLOCK_V
    v_end = tl.minimum(v_start + place.split_tiles * BLOCK_V, V)
    dx_row = row_at(gradients.dx, row, strides.dx_n, TILE.WIDTH)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        write_zeros(dx_row, strides.dx_v, v_start, v_end, offs, TILE)
        return
    x_row = row_at(logits.x, row, strides.x_n, TILE.WIDTH)
    teacher_row = row_at(logits.teacher, row, strides.teacher_n, TILE.WIDTH)
    student = side_of(x_row, strides.x_v, v_end, scale, cap_at_temperature, ACC)
    teacher = side_of(teacher_row, strides.teacher_v, v_end, teacher_scale, teacher_cap, ACC)
    ones = side_of(x_row, strides.x_v, v_end, scale, cap, ACC)
    saved = saved_ptr + row
    q, p = loaded_normaliser(saved, N), loaded_normaliser(saved + 2 * N, N)
    one = loaded_normaliser(saved + 5 * N, N) if MIX.APART else q
    found = KnownRow(q=q, p=p, ones=one, mean=tl.load(saved + 4 * N))
    upstream = tl.load(scale_ptr + row * strides.scale_n).to(ACC)
    write_pair_gradient(
        student, teacher, ones, found, upstream, v_start, dx_row, strides.dx_v, target, offs, beta, share, hard, ACC,
        TILE, OPTIONS, TEACHER, MIX, "",
    )  # fmt: skip
