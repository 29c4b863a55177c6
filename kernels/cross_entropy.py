"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`x` and `probs` are (B, T, V) with any strides, `target` is (B * T,) int64 and contiguous; an ignored row has
`target == options.ignore_index`. `options` has ignore_index, label_smoothing, softcap and logit_scale.
"""

import contextlib
from collections import namedtuple

import torch
import triton
import triton.language as tl

from .backward import backward_kernel
from .device_math import LOG2E, LOWEST
from .forward import forward_kernel, merge_kernel
from .launch import (
    ACCESS,
    FEW_REGISTERS,
    MAX_REGISTERS,
    MERGE_ROWS,
    ONE_PASS_GENERAL,
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
from .one_pass import one_pass_kernel
from .reduce import reduce_kernel, total_kernel
from .scale import scale_kernel

# `debug` switches device_assert on; without the second, it would also check every integer addition.
ASSERTS = {"debug": True, "sanitize_overflow": False}
NO_STRIDES = (0, 0, 0)

#: What `backward` needs of the rows, as callers have it in an object of their own.
Saved = namedtuple("Saved", "shift mass entropy")


def interpreted():
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _on(device):
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _strides(x):
    return NO_STRIDES if x is None else x.stride()


def _strides_of_rows(tensors):
    """Of tensors (N,), scalars, or None."""
    return tuple(0 if x is None or x.dim() == 0 else x.stride(0) for x in tensors)


def _acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layout(weight, x, *others):
    """(contiguous, aligned): whether x's classes are neighbours, and all tensors' rows start where an access may."""
    aligned = weight is None or weight.data_ptr() % ACCESS == 0
    for tensor in (x, *others):
        if tensor is not None:
            stride_b, stride_t, _ = tensor.stride()
            per_access = ACCESS // tensor.itemsize
            aligned &= not (stride_b % per_access or stride_t % per_access or tensor.data_ptr() % ACCESS)
    return x.stride(2) == 1, aligned


def _scalars(options, probs):
    """(smoothing, scale, cap) as the kernels take them, and whether there is a (soft target, scale, softcap)."""
    smoothing, softcap, scale = options.label_smoothing, options.softcap, options.logit_scale
    soft = smoothing != 0.0 or probs is not None
    if softcap is None:
        return (smoothing, scale, 1.0), (soft, scale != 1.0, False)
    return (smoothing, scale / softcap, softcap), (soft, False, True)


def _is_simple(launch, weight, probs, present):
    """Whether few registers do: one aligned row a program, not of float64, and a soft target of no tensors."""
    return launch.BLOCK_N == 1 and launch.WIDTH > 2 and probs is None and not (present[0] and weight is not None)


def _rows(x, N, dtype, with_stats):
    """(loss, lse, shift, mass, predicted, entropy)"""
    stats = N if with_stats else 0
    loss, lse, mass, entropy = (x.new_empty(n, dtype=dtype) for n in (N, N, N, stats))
    return loss, lse, x.new_empty((2, N), dtype=dtype), mass, x.new_empty(stats, dtype=torch.int64), entropy


def _pointers(rows, with_stats):
    return rows if with_stats else (*rows[:4], None, None)


def _forward(x, target, weight, probs, rows, parts, first_part, first_class, classes, launch, options, with_stats):
    """Launches the forward kernel, into `rows` or, if there are `parts`, into those from `first_part` on."""
    B, T, V = x.shape
    scalars, present = _scalars(options, probs)
    simple = _is_simple(launch, weight, probs, present) and not (with_stats or any(present) or parts)
    out = into = None
    if parts is None:
        out = _pointers(rows, with_stats)
    else:
        partial, argmax = parts if first_part == 0 else (parts[0][:, first_part:], parts[1][first_part:])
        into = partial, argmax if with_stats else None, partial.stride(0)
    with _on(x.device):
        forward_kernel[(B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)](
            x, probs, target, weight, out, into, B * T, T, V,
            (launch.splits, launch.split_tiles, first_class, classes),
            x.stride(), _strides(probs), options.ignore_index, *scalars, launch.TILE, (*present, with_stats),
            num_warps=launch.num_warps, **ASSERTS,
            **chip_of(x.device).options(FEW_REGISTERS if simple else MAX_REGISTERS),
        )  # fmt: skip


def forward(x, target, weight, probs, options, *, with_stats=False, launch=None):
    """Row losses and what backward needs: (loss, lse, shift, mass, predicted, entropy)."""
    B, T, V = x.shape
    N = B * T
    rows = _rows(x, N, _acc(x.dtype), with_stats)
    if N == 0:
        return rows
    launch = launch or forward_launch(B, T, V, x.itemsize, *_layout(weight, x, probs), chip_of(x.device))
    parts = new_parts(x, launch.splits, with_stats) if launch.splits > 1 else None
    _forward(x, target, weight, probs, rows, parts, 0, 0, V, launch, options, with_stats)
    if parts:
        _merge(target, parts, rows, options, with_stats)
    return rows


def new_parts(x, parts, with_stats):
    """Room for what `forward_part` leaves of `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    N = x.shape[0] * x.shape[1]
    argmax = x.new_empty((parts, N if with_stats else 0), dtype=torch.int64)
    return x.new_empty((5, parts, N), dtype=_acc(x.dtype)), argmax


def forward_part(x, target, weight, probs, options, *, parts, part, block, with_stats=False, launch=None):
    """The sums over one block of the vocabulary, into number `part` of `parts`.

    `x`, `weight` and `probs` are the block's, which begins at `block.first_class` of `block.classes`.
    """
    B, T, V = x.shape
    if B * T == 0:
        return
    launch = launch or part_launch(T, V, x.itemsize, *_layout(weight, x, probs), chip_of(x.device))
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
    """What `whole_shift` makes of it."""
    return (largest * LOG2E.value).floor_().clamp_(min=LOWEST.value)


def merge(target, parts, options, *, with_stats=False):
    """What `forward` returns, from all parts."""
    partial, _ = parts
    rows = _rows(partial, partial.shape[2], partial.dtype, with_stats)
    if partial.shape[2]:
        _merge(target, parts, rows, options, with_stats)
    return rows


def _merge(target, parts, rows, options, with_stats):
    partial, argmax = parts
    _, count, N = partial.shape
    with _on(partial.device):
        merge_kernel[(triton.cdiv(N, MERGE_ROWS),)](
            target, _pointers(rows, with_stats), partial, argmax if with_stats else None, N, count,
            options.ignore_index, BLOCK_N=MERGE_ROWS, num_warps=4,
        )  # fmt: skip


def backward(upstream, x, target, weight, probs, saved, options, *, dx, dprobs, block=None, launch=None):
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`.

    `upstream` has the gradients dloss, dlse and dentropy, and what multiplies dloss: factor and token_weight.
    `saved` has shift, mass and entropy of the rows, `block` is as in `forward_part`: without it, `x` has all classes.
    """
    B, T, V = x.shape
    if x.numel() == 0:
        return
    launch = launch or backward_launch(B, T, V, x.itemsize, *_layout(weight, x, probs, dx, dprobs), chip_of(x.device))
    scalars, present = _scalars(options, probs)
    simple = _is_simple(launch, weight, probs, present) and upstream.dentropy is None and not present[2]
    dloss = x.new_zeros((), dtype=saved.mass.dtype) if upstream.dloss is None else upstream.dloss
    pointers = dloss, upstream.factor, upstream.token_weight, upstream.dlse, upstream.dentropy
    with _on(x.device):
        backward_kernel[(B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)](
            x, probs, dx, dprobs, target, weight,
            (saved.shift, saved.mass, None if upstream.dentropy is None else saved.entropy), pointers, B * T, T, V,
            (launch.splits, launch.split_tiles, *(block or (0, V))),
            (x.stride(), _strides(probs), _strides(dx), _strides(dprobs), _strides_of_rows(pointers)),
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
    rows = _rows(x, N, _acc(x.dtype), with_stats)
    if N == 0:
        return rows
    chip = chip_of(x.device)
    scalars, present = _scalars(options, probs)
    simple = not (with_stats or (present[0] and weight is not None) or x.dtype == torch.float64)
    launch = launch or one_pass_launch(N, V, x.itemsize, _layout(weight, x, dx)[1], simple, chip)
    pointers = upstream.dloss, upstream.factor, upstream.token_weight, dz, None
    with _on(x.device):
        one_pass_kernel[(launch.programs,)](
            x, dx, target, weight, _pointers(rows, with_stats), pointers, N, T, V,
            (x.stride(), dx.stride(), _strides_of_rows(pointers)),
            options.ignore_index, *scalars, options.z_loss, launch.TILE, (*present, with_stats),
            num_warps=launch.num_warps, **ASSERTS, **chip.options((ONE_PASS_SIMPLE if simple else ONE_PASS_GENERAL)[1]),
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
    N = len(target)
    total = loss.new_empty((), dtype=out_dtype or loss.dtype)
    out = total, target.new_empty(()), loss.new_empty(())
    tensor = normalizer if mean and isinstance(normalizer, torch.Tensor) else None
    number = normalizer if mean and tensor is None else None
    divisor = tensor, 1.0 if number is None else float(number)
    present = bool(mean), number is not None, z_loss != 0.0
    weights = (weight, target_weight) if mean else (None, None)
    programs = 1 if N <= REDUCE_ROWS else min(REDUCE_PROGRAMS, triton.cdiv(N, REDUCE_BLOCK))
    partial = None if programs == 1 else (loss.new_empty((4, programs)), target.new_empty(programs))
    with _on(loss.device):
        reduce_kernel[(programs,)](
            loss, lse, target, *weights, token_weight, tensor, *(partial or (None, None)), out,
            N, triton.cdiv(N, programs), first_class, 0 if weight is None else len(weight),
            0 if token_weight is None else token_weight.stride(0), options.ignore_index, divisor[1], z_loss,
            BLOCK_N=min(REDUCE_BLOCK, max(128, triton.next_power_of_2(N))), OPTIONS=present,
            num_warps=(REDUCE_THREADS if N > 1024 else 128) // chip_of(loss.device).warp_size,
        )  # fmt: skip
        if partial:
            total_kernel[(1,)](
                *partial, tensor, out, programs, divisor[1], z_loss,
                BLOCK=REDUCE_PROGRAMS, OPTIONS=present, num_warps=4,
            )  # fmt: skip
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
    launch = scale_launch(T, V, dx.itemsize, *_layout(None, dx, into), chip)
    blocks = B * triton.cdiv(T, launch.BLOCK_N)
    with _on(dx.device):
        scale_kernel[(min(blocks, launch.programs),)](
            dx, into, dloss, factor, blocks, T, V, (dx.stride(), into.stride()), launch.TILE,
            INPLACE=out is None, ACC=tl.float64 if dx.dtype == torch.float64 else tl.float32,
            num_warps=launch.num_warps,
        )  # fmt: skip
