"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`x` and `probs` are (B, T, V) with any strides, `target` is (B * T,) int64 and contiguous; an ignored row has
`target == options.ignore_index`. `options` has ignore_index, label_smoothing, softcap and logit_scale.
"""

import contextlib
from types import SimpleNamespace

import torch
import triton

from .backward import backward_kernel
from .forward import forward_kernel, merge_kernel
from .launch import ACCESS, MERGE_ROWS, backward_launch, chip_of, forward_launch, part_launch

# `debug` switches device_assert on; without the second, it would also check every integer addition.
ASSERTS = {"debug": True, "sanitize_overflow": False}
NO_STRIDES = (0, 0, 0)
LOG2E, LOWEST = 1.4426950408889634, -2147483648.0


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


def _acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layout(*tensors):
    """(contiguous, aligned): whether all tensors' rows are contiguous, and start where a thread's access may."""
    aligned = True
    for x in tensors:
        if x is None:
            continue
        stride_b, stride_t, stride_v = x.stride()
        if stride_v != 1:
            return False, False
        per_access = ACCESS // x.itemsize
        aligned &= not (stride_b % per_access or stride_t % per_access or x.data_ptr() % ACCESS)
    return True, aligned


def _scalars(options):
    """(smoothing, scale, cap) as the kernels take them, and which of them are there."""
    smoothing, softcap, scale = options.label_smoothing, options.softcap, options.logit_scale
    if softcap is None:
        return (smoothing, scale, 1.0), (smoothing != 0.0, scale != 1.0, False)
    return (smoothing, scale / softcap, softcap), (smoothing != 0.0, False, True)


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
    scalars, present = _scalars(options)
    simple = (
        launch.BLOCK_N == 1 and probs is None and not (present[2] or with_stats or (present[0] and weight is not None))
    )
    if parts is None:
        out, into, all_parts = _pointers(rows, with_stats), None, 1
    else:
        out, into, all_parts = None, (parts[0], parts[1] if with_stats else None), parts[0].shape[1]
    with _on(x.device):
        forward_kernel[(B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)](
            x, probs, target, weight, out, into, B * T, T, V,
            (launch.splits, launch.split_tiles, first_part, all_parts, first_class, classes),
            x.stride(), _strides(probs), options.ignore_index, *scalars, launch.TILE, present,
            num_warps=launch.num_warps, **ASSERTS, **chip_of(x.device).options(simple),
        )  # fmt: skip


def forward(x, target, weight, probs, options, *, with_stats=False, launch=None):
    """Row losses and what backward needs: (loss, lse, shift, mass, predicted, entropy)."""
    B, T, V = x.shape
    N = B * T
    rows = _rows(x, N, _acc(x.dtype), with_stats)
    if N == 0:
        return rows
    launch = launch or forward_launch(B, T, V, x.itemsize, *_layout(x, probs), chip_of(x.device))
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
    launch = launch or part_launch(T, V, x.itemsize, *_layout(x, probs), chip_of(x.device))
    _forward(x, target, weight, probs, None, parts, part, *block, launch, options, with_stats)


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
    launch = launch or backward_launch(B, T, V, x.itemsize, *_layout(x, probs, dx, dprobs), chip_of(x.device))
    scalars, present = _scalars(options)
    simple = launch.BLOCK_N == 1 and dprobs is None and upstream.dentropy is None and not present[2]
    pointers = upstream.dloss, upstream.factor, upstream.token_weight, upstream.dlse, upstream.dentropy
    strides = tuple(0 if g is None or g.dim() == 0 else g.stride(0) for g in pointers)
    with _on(x.device):
        backward_kernel[(B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)](
            x, probs, dx, dprobs, target, weight,
            (saved.shift, saved.mass, None if upstream.dentropy is None else saved.entropy), pointers, B * T, T, V,
            (launch.splits, launch.split_tiles, *(block or (0, V))),
            (x.stride(), _strides(probs), _strides(dx), _strides(dprobs), strides),
            options.ignore_index, *scalars, launch.TILE, present,
            num_warps=launch.num_warps, **chip_of(x.device).options(simple),
        )  # fmt: skip


def combine(parts):
    """The sums over all parts, as one part."""
    (largest, s, r, mass, d), argmax = parts
    if len(largest) == 1:
        return parts
    most, at = largest.max(0, keepdim=True)
    shift, shift_of_most = ((t * LOG2E).floor().clamp(min=LOWEST) for t in (largest, most))
    back = shift - shift_of_most
    beta = back.exp2()
    sums = (s * beta, r + mass * back, mass, beta * (d + s * back))
    partial = torch.stack([most, *(each.sum(0, keepdim=True) for each in sums)])
    return partial, argmax.gather(0, at) if argmax.shape[1] else argmax[:1]


def forward_backward(upstream, x, target, weight, probs, options, *, dx, dz, with_stats):
    rows = forward(x, target, weight, probs, options, with_stats=with_stats)
    loss, lse, shift, mass, predicted, entropy = rows
    dlse = None if dz is None else 2.0 * options.z_loss * lse * dz
    saved = SimpleNamespace(shift=shift, mass=mass, entropy=entropy)
    upstream = upstream._replace(dlse=dlse)
    backward(upstream, x, target, weight, probs, saved, options, dx=dx, dprobs=None)
    return rows
