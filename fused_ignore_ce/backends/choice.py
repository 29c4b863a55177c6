"""The backends that compute the results of rows: what each of them offers, and which one runs."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.operators import is_plain
from ..core.options import LossOptions, check_backend, out_of_bounds
from ..core.rows import Block, Logits, Rows, Saved, Upstream
from . import pytorch

#: The sums over blocks of the vocabulary, (5, parts, N), and their argmax (parts, N), empty without statistics.
Parts = tuple[Tensor, Tensor]


class Backend(Protocol):
    """The functions that a backend offers.

    Logits, probabilities, `dx` and `dprobs` are (B, T, V) with any strides; class weights (V,) and targets (B * T,),
    int64, are contiguous. An ignored row has `target == options.ignore_index`.
    """

    def forward(
        self,
        logits: Logits,
        options: LossOptions,
        *,
        with_stats: bool,
    ) -> Rows:
        """The results of all rows."""

    def new_parts(self, x: Tensor, parts: int, with_stats: bool) -> Parts:
        """Allocates what `forward_part` writes for `parts` blocks."""

    def forward_part(
        self,
        logits: Logits,
        options: LossOptions,
        *,
        parts: Parts,
        part: int,
        block: Block,
        with_stats: bool,
    ) -> None:
        """Writes the sums over one block of the vocabulary into number `part` of `parts`."""

    def combine(self, parts: Parts) -> Parts:
        """The sums over all parts, as one part."""

    def merge(self, target: Tensor, parts: Parts, options: LossOptions, *, with_stats: bool) -> Rows:
        """The results of all rows, from all parts."""

    def backward(
        self,
        upstream: Upstream,
        logits: Logits,
        saved: Saved,
        options: LossOptions,
        *,
        dx: Tensor | None,
        dprobs: Tensor | None,
        block: Block | None,
    ) -> None:
        """Writes the gradients of kept rows, and zeros for ignored ones, into `dx` and `dprobs`.

        `dx` may be `logits.x`. Without a block, the logits have the whole vocabulary.
        """

    def forward_backward(
        self,
        upstream: Upstream,
        logits: Logits,
        options: LossOptions,
        *,
        dx: Tensor,
        dz: Tensor | None,
        with_stats: bool,
    ) -> Rows:
        """The results of all rows; writes the gradient of their scaled sum into `dx`, which may be `logits.x`.

        `upstream` has the factors of the losses. `dz` (N,) are those of `options.z_loss * lse**2`; None for no z-loss.
        """

    def scale(self, dx: Tensor, factor: Tensor | None, dloss: Tensor, *, out: Tensor | None = None) -> None:
        """`dx * dloss * factor`, in place or into `out`. In place, a backend may skip the work if the product is 1."""


def choose(backend: str, device: torch.device) -> str:
    """The backend, "triton" or "torch", for tensors on this device."""
    check_backend(backend)
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return backend


def implementation(backend: str, device: torch.device) -> Backend:
    """The backend's module for this device. It is looked up when it runs, never while tracing."""
    return pytorch if backend == "torch" else _triton(device.type)


@functools.cache
def _triton(device_type: str) -> Backend:
    try:
        from ..kernels import cross_entropy as module
    except ImportError as error:
        raise RuntimeError(
            f'backend="triton" for {device_type} tensors needs Triton, which cannot be imported ({error}): install it, '
            f'or pass backend="torch"'
        ) from error
    kernels: Any = module
    if device_type == "cpu" and not kernels.interpreted():
        raise RuntimeError(
            'backend="triton" on a CPU tensor runs in Triton\'s interpreter only: set TRITON_INTERPRET=1 before '
            'fused_ignore_ce is first used, or pass backend="torch"'
        )
    if device_type not in ("cuda", "cpu"):
        raise RuntimeError(f'backend="triton" expects CUDA tensors, got {device_type} ones; pass backend="torch"')
    backend: Backend = kernels
    return backend


def check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    """Raises an IndexError for a target out of range on CPU. Elsewhere the kernels assert on the device."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        raise IndexError(out_of_bounds(int(target[wrong][0]), classes, ignore_index))


def scaled(gradient: Tensor, dloss: Tensor, backend: str, factor: Tensor | None = None) -> Tensor:
    """Multiplies a gradient from forward by the upstream gradient, and by a factor that was left out of it.

    It is done in place, unless backward may run again.
    """
    if not is_plain(gradient):
        return (gradient * dloss.reshape(1)).to(gradient.dtype)
    kernels = implementation(backend, gradient.device)
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        kernels.scale(gradient, factor, dloss)
        return gradient
    out = torch.empty_like(gradient)
    kernels.scale(gradient, factor, dloss, out=out)
    return out
