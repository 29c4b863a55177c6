"""Which backend computes the rows of a tensor, and what all of them leave to their caller."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..core.eager import is_plain
from ..core.options import check_backend, out_of_bounds
from . import divergences, pytorch, top_k
from .protocol import Backend, Distiller


def choose(backend: str, device: torch.device) -> str:
    """The backend, "triton" or "torch", for tensors on this device."""
    check_backend(backend)
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return backend


def implementation(backend: str, device: torch.device) -> Backend:
    """The backend's module for this device. It is looked up when it runs, never while tracing."""
    return pytorch if backend == "torch" else _triton(device.type)


def distiller(backend: str, device: torch.device, tail: str = "") -> Distiller:
    """The backend's functions for distillation on this device; with a `tail`, of a teacher's likeliest classes."""
    if backend == "torch":
        return divergences.ByRows(divergences.rows)
    _triton(device.type)
    if tail:
        return divergences.ByRows(top_k.rows)
    from ..kernels import distillation

    kernels: Any = distillation
    module: Distiller = kernels
    return module


@functools.cache
def _triton(device_type: str) -> Backend:
    try:
        from ..kernels import cross_entropy as module
    except ImportError as error:
        got = '"triton" or "auto"' if device_type == "cuda" else '"triton"'
        raise RuntimeError(
            f'backend: expected "torch" for {device_type} tensors, as Triton cannot be imported ({error}), got {got}; '
            'install Triton, or pass backend="torch"'
        ) from error
    kernels: Any = module
    if device_type == "cpu" and not kernels.interpreted():
        raise RuntimeError(
            'backend: expected "torch" for CPU tensors, got "triton", which takes them in Triton\'s interpreter only; '
            'set TRITON_INTERPRET=1 before fused_ignore_ce is first used, or pass backend="torch"'
        )
    if device_type not in ("cuda", "cpu"):
        raise RuntimeError(
            f'backend: expected "torch" for {device_type} tensors, got "triton", whose kernels take CUDA tensors; pass '
            'backend="torch"'
        )
    backend: Backend = kernels
    return backend


def check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    """Raises an IndexError for a target out of range on CPU. Elsewhere the kernels assert on the device."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        raise IndexError(out_of_bounds(int(target[wrong][0]), classes, ignore_index))


def scaled(
    gradient: Tensor, dloss: Tensor, backend: str, factor: Tensor | None = None, *, keep: bool = False
) -> Tensor:
    """Multiplies a gradient from forward by the upstream gradient, and by a factor that was left out of it.

    It is done in place, unless backward may run again or the gradient is to be kept.
    """
    if not is_plain(gradient):
        # A gradient of 0, as that of an ignored row, stays 0 even where the product is inf or NaN.
        return (gradient * dloss.reshape(1)).masked_fill_(gradient == 0, 0.0).to(gradient.dtype)
    kernels = implementation(backend, gradient.device)
    if not keep and not torch._C._autograd._get_current_graph_task_keep_graph():
        kernels.scale(gradient, factor, dloss)
        return gradient
    out = torch.empty_like(gradient)
    kernels.scale(gradient, factor, dloss, out=out)
    return out
