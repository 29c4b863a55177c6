"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`x` and `probs` are (B, T, V) with any strides, `target` is (B * T,) int64 and contiguous; an ignored row has
`target == ignore_index`.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .backward import backward_kernel
from .forward import forward_kernel, merge_kernel
from .launch import MAX_REGISTERS, MERGE_ROWS, chip_of, forward_launch, tile, unsplit

# `debug` switches device_assert on; without the second, it would also check every integer addition.
ASSERTS = {"debug": True, "sanitize_overflow": False}
REGISTERS = {"maxnreg": MAX_REGISTERS}


def interpreted():
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _on(device):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _strides(x):
    return (0, 0, 0) if x is None else x.stride()


def _acc(x):
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _scalars(softcap, logit_scale):
    """(pre_scale, softcap) as the kernels take them, and whether each is needed."""
    if softcap is None:
        return logit_scale, 1.0, {"HAS_SCALE": logit_scale != 1.0, "HAS_SOFTCAP": False}
    return logit_scale / softcap, softcap, {"HAS_SCALE": False, "HAS_SOFTCAP": True}


def _flags(weight, probs, label_smoothing):
    return {
        "HAS_WEIGHT": weight is not None,
        "HAS_PROBS": probs is not None,
        "HAS_SMOOTHING": label_smoothing != 0.0,
    }


def _outputs(x, N, dtype, with_stats):
    """(loss, lse, mass, correct, entropy)"""
    stats = N if with_stats else 0
    return (
        x.new_empty(N, dtype=dtype),
        x.new_empty((2, N), dtype=dtype),
        x.new_empty(N, dtype=dtype),
        x.new_empty(stats, dtype=torch.bool),
        x.new_empty(stats, dtype=dtype),
    )


def _forward(x, target, weight, probs, outputs, parts, first_part, first_class, classes, launch, options, with_stats):
    """Launches the forward kernel, into `outputs` or, if there are `parts`, into those from `first_part` on."""
    B, T, V = x.shape
    pre_scale, cap, scale_flags = _scalars(options["softcap"], options["logit_scale"])
    partial, argmax = parts or (None, None)
    grid = (B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)
    with _on(x.device):
        forward_kernel[grid](
            x, target, weight, probs, *outputs, partial, argmax,
            B, T, V, launch.splits, launch.split_v, first_part, partial.shape[1] if parts else 1, first_class, classes,
            *x.stride(), *_strides(probs),
            options["ignore_index"], options["label_smoothing"], pre_scale, cap, options["z_loss"],
            ACC=_acc(x)[1], BLOCK_N=launch.BLOCK_N, BLOCK_V=launch.BLOCK_V, IS_PART=parts is not None,
            HAS_STATS=with_stats, num_warps=launch.num_warps,
            **_flags(weight, probs, options["label_smoothing"]), **scale_flags, **ASSERTS, **REGISTERS,
        )  # fmt: skip


def forward(x, target, weight, probs, *, with_stats, launch=None, **options):
    """Row losses and what backward needs: (loss, lse, mass, correct, entropy)."""
    B, T, V = x.shape
    N = B * T
    outputs = _outputs(x, N, _acc(x)[0], with_stats)
    if N == 0:
        return outputs
    launch = launch or forward_launch(B, T, V, x.itemsize, x.stride(2) == 1, chip_of(x.device))
    parts = new_parts(x, launch.splits, with_stats) if launch.splits > 1 else None
    _forward(x, target, weight, probs, outputs, parts, 0, 0, V, launch, options, with_stats)
    if parts:
        _merge(target, parts, outputs, options["ignore_index"], options["z_loss"], with_stats)
    return outputs


def new_parts(x, parts, with_stats):
    """Room for what `forward_part` leaves of `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    N = x.shape[0] * x.shape[1]
    argmax = x.new_empty((parts, N if with_stats else 0), dtype=torch.int32)
    return x.new_empty((5, parts, N), dtype=_acc(x)[0]), argmax


def forward_part(x, target, weight, probs, *, parts, part, first_class, classes, with_stats, **options):
    """The sums over one block of the vocabulary, into number `part` of `parts`.

    `x`, `weight` and `probs` are the block's, from `first_class` on; `classes` is the size of the whole vocabulary.
    """
    B, T, V = x.shape
    if B * T == 0:
        return
    outputs = (None,) * 5
    launch = unsplit(tile(T, V, x.itemsize, x.stride(2) == 1), V)
    _forward(x, target, weight, probs, outputs, parts, part, first_class, classes, launch, options, with_stats)


def merge(target, parts, *, ignore_index, z_loss, with_stats):
    """What `forward` returns, from all parts."""
    partial, _ = parts
    N = partial.shape[2]
    outputs = _outputs(partial, N, partial.dtype, with_stats)
    if N:
        _merge(target, parts, outputs, ignore_index, z_loss, with_stats)
    return outputs


def _merge(target, parts, outputs, ignore_index, z_loss, with_stats):
    partial, argmax = parts
    N = partial.shape[2]
    with _on(partial.device):
        merge_kernel[(triton.cdiv(N, MERGE_ROWS),)](
            target, *outputs, partial, argmax, N, partial.shape[1], ignore_index, z_loss,
            ACC=_acc(partial)[1], BLOCK_N=MERGE_ROWS, HAS_STATS=with_stats, num_warps=4,
        )  # fmt: skip


def backward(
    dloss, x, target, weight, probs, lse, mass, *,
    ignore_index, label_smoothing, softcap, logit_scale, z_loss, dx, dprobs, first_class=0, classes=None,
):  # fmt: skip
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`.

    `first_class` and `classes` are those of `forward_part`; without them, `x` has the whole vocabulary.
    """
    B, T, V = x.shape
    if x.numel() == 0:
        return
    launch = tile(T, V, x.itemsize, x.stride(2) == 1)
    pre_scale, cap, scale_flags = _scalars(softcap, logit_scale)
    grid = (B * triton.cdiv(T, launch.BLOCK_N) * triton.cdiv(V, launch.BLOCK_V),)
    with _on(x.device):
        backward_kernel[grid](
            dloss, x, target, weight, probs, lse, mass, dx, dprobs,
            B, T, V, first_class, V if classes is None else classes,
            dloss.stride(0), *x.stride(), *_strides(probs), *_strides(dx), *_strides(dprobs),
            ignore_index, label_smoothing, pre_scale, cap, z_loss,
            ACC=_acc(x)[1], BLOCK_N=launch.BLOCK_N, BLOCK_V=launch.BLOCK_V,
            HAS_DX=dx is not None, HAS_DPROBS=dprobs is not None, num_warps=launch.num_warps,
            **_flags(weight, probs, label_smoothing), **scale_flags, **REGISTERS,
        )  # fmt: skip
