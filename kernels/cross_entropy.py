"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`x` and `probs` are (B, T, V) with any strides, `target` is (B * T,) int64 and contiguous; an ignored row has
`target == options.ignore_index`. `options` has ignore_index, label_smoothing, softcap and logit_scale.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from .arguments import acc_dtype, is_simple, layout, new_rows, on, row_pointers, scalars_of, strides_of, strides_of_rows
from .backward import backward_kernel
from .device_math import LOG2E, LOWEST
from .forward import forward_kernel
from .launch import (
    FEW_REGISTERS,
    MAX_REGISTERS,
    MERGE_AND_REDUCE_ROWS,
    MERGE_ROWS,
    ONE_PASS_GENERAL,
    ONE_PASS_PLAIN,
    ONE_PASS_SIMPLE,
    REDUCE_BLOCK,
    REDUCE_PROGRAMS,
    REDUCE_ROWS,
    REDUCE_THREADS,
    backward_launch,
    chip_of,
    forward_launch,
    one_pass_launch,
    part_launch,
    scale_launch,
)
from .merge import merge_kernel
from .one_pass import one_pass_kernel
from .reduce import reduce_kernel, total_kernel
from .scale import scale_kernel

# `debug` switches device_assert on; without the second, it would also check every integer addition.
ASSERTS = {"debug": True, "sanitize_overflow": False}

#: What `backward` needs of the rows, as callers have it in an object of their own.
Saved = namedtuple("Saved", "shift mass entropy")


def interpreted():
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _forward(x, target, weight, probs, rows, parts, first_part, first_class, classes, launch, options, with_stats):
    """Launches the forward kernel, into `rows` or, if there are `parts`, into those from `first_part` on."""
    B, T, V = x.shape
    scalars, present = scalars_of(options, probs)
    simple = is_simple(launch, weight, probs, present) and not (with_stats or any(present) or parts)
    out = into = None
    if parts is None:
        out = row_pointers(rows, with_stats)
    else:
        partial, argmax = parts if first_part == 0 else (parts[0][:, first_part:], parts[1][first_part:])
        into = partial, argmax, partial.stride(0)
    with on(x.device):
        forward_kernel[(B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)](
            x, probs, target, weight, out, into, B * T, T, V,
            (launch.splits, launch.split_tiles, first_class, classes),
            x.stride(), strides_of(probs), options.ignore_index, *scalars, launch.TILE, (*present, with_stats),
            num_warps=launch.num_warps, **ASSERTS,
            **chip_of(x.device).options(FEW_REGISTERS if simple else MAX_REGISTERS),
        )  # fmt: skip


def _split_forward(x, target, weight, probs, options, with_stats, launch):
    """(rows, parts): the kernel has filled one of them, and parts are None or what is to be merged into the rows."""
    B, T, V = x.shape
    rows = new_rows(x, B * T, acc_dtype(x.dtype), with_stats)
    if B * T == 0:
        return rows, None
    launch = launch or forward_launch(B, T, V, x.itemsize, *layout(weight, x, probs), chip_of(x.device))
    parts = new_parts(x, launch.splits, with_stats) if launch.splits > 1 else None
    _forward(x, target, weight, probs, rows, parts, 0, 0, V, launch, options, with_stats)
    return rows, parts


def forward(x, target, weight, probs, options, *, with_stats=False, launch=None):
    """Row losses and what backward needs: (loss, lse, shift, mass, predicted, entropy)."""
    rows, parts = _split_forward(x, target, weight, probs, options, with_stats, launch)
    if parts:
        _merge(target, parts, rows, options, with_stats)
    return rows


def forward_reduce(
    x, target, weight, probs, token_weight, normalizer, options, *,
    mean, z_loss=0.0, out_dtype=None, with_stats=False, launch=None,
):  # fmt: skip
    """(what `forward` returns, what `reduce` returns), in two launches.

    Class weights enter the divisor of "mean" for index targets only, as PyTorch has it.
    """
    rows, parts = _split_forward(x, target, weight, probs, options, with_stats, launch)
    if parts and len(target) > MERGE_AND_REDUCE_ROWS:
        _merge(target, parts, rows, options, with_stats)
        parts = None
    class_weight = weight if probs is None else None
    how = {"mean": mean, "z_loss": z_loss, "out_dtype": out_dtype, "first_class": 0, "target_weight": None}
    return rows, _reduce(rows, parts, target, class_weight, token_weight, normalizer, options, with_stats, **how)


def new_parts(x, parts, with_stats):
    """Room for what `forward_part` leaves of `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    N = x.shape[0] * x.shape[1]
    argmax = x.new_empty((parts, N if with_stats else 0), dtype=torch.int64)
    return x.new_empty((5, parts, N), dtype=acc_dtype(x.dtype)), argmax


def forward_part(x, target, weight, probs, options, *, parts, part, block, with_stats=False, launch=None):
    """The sums over one block of the vocabulary, into number `part` of `parts`.

    `x`, `weight` and `probs` are the block's, which begins at `block.first_class` of `block.classes`.
    """
    B, T, V = x.shape
    if B * T == 0:
        return
    launch = launch or part_launch(T, V, x.itemsize, *layout(weight, x, probs), chip_of(x.device))
    _forward(x, target, weight, probs, None, parts, part, *block, launch, options, with_stats)


def combine(parts):
    """The sums over all parts, as one part: ((5, 1, N), (1, N))."""
    (largest, s, r, mass, d), argmax = parts
    if len(largest) == 1:
        return parts
    most, at = largest.max(0, keepdim=True)
    down = _shift(largest) - _shift(most)
    power = down.exp2()
    sums = s * power, r + mass * down, mass, power * (d + s * down)
    partial = torch.stack([most, *(each.sum(0, keepdim=True) for each in sums)])
    return partial, argmax.gather(0, at) if argmax.shape[1] else argmax[:1]


def _shift(largest):
    """The shift that `whole_shift` gives for a largest logit."""
    return (largest * LOG2E.value).floor_().clamp_(min=LOWEST.value)


def merge(target, parts, options, *, with_stats=False):
    """What `forward` returns, from all parts."""
    partial, _ = parts
    rows = new_rows(partial, partial.shape[2], partial.dtype, with_stats)
    if partial.shape[2]:
        _merge(target, parts, rows, options, with_stats)
    return rows


def _parts(parts):
    """The arguments of `merge_rows` for these parts."""
    partial, argmax = parts
    return partial, argmax, partial.shape[1]


def _merge(target, parts, rows, options, with_stats):
    N = len(target)
    with on(target.device):
        merge_kernel[(triton.cdiv(N, MERGE_ROWS),)](
            target, row_pointers(rows, with_stats), _parts(parts), N, options.ignore_index,
            BLOCK_N=MERGE_ROWS, HAS_STATS=with_stats, num_warps=MERGE_ROWS // chip_of(target.device).warp_size,
        )  # fmt: skip


def backward(upstream, x, target, weight, probs, saved, options, *, dx, dprobs, block=None, launch=None):
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`.

    `upstream` has the gradients dloss, dlse and dentropy, and what multiplies dloss: factor and token_weight.
    `saved` has shift, mass and entropy of the rows, `block` is as in `forward_part`: without it, `x` has all classes.
    """
    B, T, V = x.shape
    if x.numel() == 0:
        return
    launch = launch or backward_launch(B, T, V, x.itemsize, *layout(weight, x, probs, dx, dprobs), chip_of(x.device))
    scalars, present = scalars_of(options, probs)
    simple = is_simple(launch, weight, probs, present) and upstream.dentropy is None and not present[2]
    dloss = x.new_zeros((), dtype=saved.mass.dtype) if upstream.dloss is None else upstream.dloss
    pointers = dloss, upstream.factor, upstream.token_weight, upstream.dlse, upstream.dentropy
    with on(x.device):
        backward_kernel[(B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)](
            x, probs, dx, dprobs, target, weight,
            (saved.shift, saved.mass, None if upstream.dentropy is None else saved.entropy), pointers, B * T, T, V,
            (launch.splits, launch.split_tiles, *(block or (0, V))),
            (x.stride(), strides_of(probs), strides_of(dx), strides_of(dprobs), strides_of_rows(pointers)),
            options.ignore_index, *scalars, launch.TILE, present,
            num_warps=launch.num_warps, **chip_of(x.device).options(FEW_REGISTERS if simple else MAX_REGISTERS),
        )  # fmt: skip


def can_one_pass(x, probs=None):
    """Whether `forward_backward` takes these: rows of contiguous classes with index targets."""
    return probs is None and x.stride(2) == 1


def forward_backward(upstream, x, target, weight, probs, options, *, dx, dz=None, with_stats=False, launch=None):
    """The rows of `forward`; writes into `dx` (which may be `x`) the gradient of sum(g * loss + z_loss * dz * lse^2).

    g is `upstream.dloss`, times `factor` and `token_weight` where they are there. Each row is read from device memory
    once, and the gradient takes it from the cache; but twice where classes are strided or targets are probabilities.
    """
    if not can_one_pass(x, probs) or dx.stride(2) != 1:
        rows = forward(x, target, weight, probs, options, with_stats=with_stats)
        upstream = upstream._replace(dlse=None if dz is None else 2.0 * options.z_loss * rows[1] * dz)
        backward(upstream, x, target, weight, probs, Saved(rows[2], rows[3], None), options, dx=dx, dprobs=None)
        return rows
    B, T, V = x.shape
    N = B * T
    rows = new_rows(x, N, acc_dtype(x.dtype), with_stats)
    if N == 0:
        return rows
    chip = chip_of(x.device)
    scalars, present = scalars_of(options, probs)
    variant = ONE_PASS_SIMPLE if any(present) or V % 16 else ONE_PASS_PLAIN  # Triton compiles in that V % 16 == 0
    if with_stats or (present[0] and weight is not None) or x.dtype == torch.float64:
        variant = ONE_PASS_GENERAL
    launch = launch or one_pass_launch(N, V, x.itemsize, layout(weight, x, dx)[1], variant, chip)
    pointers = upstream.dloss, upstream.factor, upstream.token_weight, dz, None
    with on(x.device):
        one_pass_kernel[(launch.programs,)](
            x, dx, target, weight, row_pointers(rows, with_stats), pointers, N, T, V,
            (x.stride(), dx.stride(), strides_of_rows(pointers)),
            options.ignore_index, *scalars, options.z_loss, launch.TILE, (*present, with_stats),
            num_warps=launch.num_warps, **ASSERTS, **chip.options(variant.registers),
        )  # fmt: skip
    return rows


def reduce(
    loss, lse, target, weight, token_weight, normalizer, options, *,
    mean, z_loss=0.0, out_dtype=None, target_weight=None, first_class=0,
):  # fmt: skip
    """(total, number of kept rows (int64), what every row's gradient of the total is multiplied by), all 0-d.

    The total is the sum of the kept rows' losses, times their token weights; divided, for "mean", by `normalizer` (a
    number or 0-d tensor) or by the sum of the kept rows' shares: token weight times the target's class weight, of
    which there is either `weight`, of all classes from `first_class` on, or `target_weight`, of each row. A `z_loss`
    is added, times the squares of `lse`; "mean" divides it by the token weights alone.
    """
    rows = loss, lse
    how = {"mean": mean, "z_loss": z_loss, "out_dtype": out_dtype, "first_class": first_class}
    return _reduce(
        rows, None, target, weight, token_weight, normalizer, options, False, target_weight=target_weight, **how
    )


def _reduce(
    rows, parts, target, weight, token_weight, normalizer, options, with_stats, *,
    mean, z_loss, out_dtype, target_weight, first_class,
):  # fmt: skip
    """Reduces rows, or parts, which are then merged into the rows on the way."""
    loss, N = rows[0], len(target)
    out = loss.new_empty((), dtype=out_dtype or loss.dtype), target.new_empty(()), loss.new_empty(())
    tensor = normalizer if mean and isinstance(normalizer, torch.Tensor) else None
    has_number = bool(mean) and normalizer is not None and tensor is None
    number = float(normalizer) if has_number else 1.0
    present = bool(mean), has_number, z_loss != 0.0, with_stats
    weights = (weight if mean else None, target_weight if mean else None, token_weight)
    stride_tw = 0 if token_weight is None else token_weight.stride(0)
    programs = 1 if N <= REDUCE_ROWS else min(REDUCE_PROGRAMS, triton.cdiv(N, REDUCE_BLOCK))
    sums = None if programs == 1 else (loss.new_empty((4, programs)), target.new_empty(programs))
    block = min(REDUCE_BLOCK, max(128, triton.next_power_of_2(N)))
    with on(loss.device):
        reduce_kernel[(programs,)](
            rows[:2] if parts is None else row_pointers(rows, with_stats),
            None if parts is None else _parts(parts),
            target, weights, tensor, sums, out, N, triton.cdiv(N, programs),
            (first_class, 0 if weight is None else len(weight), stride_tw), options.ignore_index, number, z_loss,
            BLOCK_N=block, OPTIONS=present,
            num_warps=min(block, REDUCE_THREADS) // chip_of(loss.device).warp_size,
        )  # fmt: skip
        if sums:
            total_kernel[(1,)](
                *sums, tensor, out, programs, number, z_loss, BLOCK=REDUCE_PROGRAMS, OPTIONS=present, num_warps=4
            )
    return out


def scale(dx, factor, dloss, *, out=None):
    """`dx * dloss * factor`, in place or into `out`; a factor of None is 1. In place, a product of 1 moves nothing.

    `dx` may have any number of dimensions if it is contiguous.
    """
    if dx.numel() == 0:
        return
    into = dx if out is None else out
    if dx.dim() != 3:
        dx, into = (t.view(1, -1, t.shape[-1] if t.dim() else 1) for t in (dx, into))
    B, T, V = dx.shape
    chip = chip_of(dx.device)
    launch = scale_launch(T, V, dx.itemsize, *layout(None, dx, into), chip)
    blocks = B * triton.cdiv(T, launch.BLOCK_N)
    with on(dx.device):
        scale_kernel[(min(blocks, launch.programs),)](
            dx, into, dloss, factor, blocks, T, V, (dx.stride(), into.stride()), launch.TILE,
            INPLACE=out is None, ACC=tl.float64 if dx.dtype == torch.float64 else tl.float32,
            num_warps=launch.num_warps,
        )  # fmt: skip
