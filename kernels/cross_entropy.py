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
from .launch import MAX_REGISTERS, MERGE_ROWS, chip_of, forward_launch, tile

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


def forward(
    x, target, weight, probs, *, ignore_index, label_smoothing, softcap, logit_scale, z_loss, with_stats, launch=None
):
    """Row losses and what backward needs: (loss, lse, mass, correct, entropy)."""
    B, T, V = x.shape
    N = B * T
    dtype, ACC = _acc(x)
    loss = x.new_empty(N, dtype=dtype)
    lse = x.new_empty((2, N), dtype=dtype)
    mass = x.new_empty(N, dtype=dtype)
    correct = x.new_empty(N if with_stats else 0, dtype=torch.bool)
    entropy = x.new_empty(N if with_stats else 0, dtype=dtype)
    outputs = (loss, lse, mass, correct, entropy)
    if N == 0:
        return outputs

    launch = launch or forward_launch(B, T, V, x.itemsize, x.stride(2) == 1, chip_of(x.device))
    partial = argmax = None
    if launch.splits > 1:
        partial = x.new_empty((5, launch.splits, N), dtype=dtype)
        argmax = x.new_empty((launch.splits, N), dtype=torch.int32) if with_stats else None
    pre_scale, cap, scale_flags = _scalars(softcap, logit_scale)
    grid = (B * triton.cdiv(T, launch.BLOCK_N) * launch.splits,)
    with _on(x.device):
        forward_kernel[grid](
            x, target, weight, probs, *outputs, partial, argmax,
            B, T, V, launch.splits, launch.split_v, *x.stride(), *_strides(probs),
            ignore_index, label_smoothing, pre_scale, cap, z_loss,
            ACC=ACC, BLOCK_N=launch.BLOCK_N, BLOCK_V=launch.BLOCK_V, IS_SPLIT=launch.splits > 1,
            HAS_STATS=with_stats, num_warps=launch.num_warps,
            **_flags(weight, probs, label_smoothing), **scale_flags, **ASSERTS, **REGISTERS,
        )  # fmt: skip
        if launch.splits > 1:
            merge_kernel[(triton.cdiv(N, MERGE_ROWS),)](
                target, *outputs, partial, argmax, N, launch.splits, ignore_index, z_loss,
                ACC=ACC, BLOCK_N=MERGE_ROWS, HAS_STATS=with_stats, num_warps=4,
            )  # fmt: skip
    return outputs


def backward(
    dloss, x, target, weight, probs, lse, mass, *,
    ignore_index, label_smoothing, softcap, logit_scale, z_loss, dx, dprobs,
):  # fmt: skip
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`."""
    B, T, V = x.shape
    if x.numel() == 0:
        return
    launch = tile(T, V, x.itemsize, x.stride(2) == 1)
    pre_scale, cap, scale_flags = _scalars(softcap, logit_scale)
    grid = (B * triton.cdiv(T, launch.BLOCK_N) * triton.cdiv(V, launch.BLOCK_V),)
    with _on(x.device):
        backward_kernel[grid](
            dloss, x, target, weight, probs, lse, mass, dx, dprobs,
            B, T, V, dloss.stride(0), *x.stride(), *_strides(probs), *_strides(dx), *_strides(dprobs),
            ignore_index, label_smoothing, pre_scale, cap, z_loss,
            ACC=_acc(x)[1], BLOCK_N=launch.BLOCK_N, BLOCK_V=launch.BLOCK_V,
            HAS_DX=dx is not None, HAS_DPROBS=dprobs is not None, num_warps=launch.num_warps,
            **_flags(weight, probs, label_smoothing), **scale_flags, **REGISTERS,
        )  # fmt: skip
