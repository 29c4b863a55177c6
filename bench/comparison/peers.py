"""The losses that are compared. Each is called with this package's names of operands and options."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.packages import imported, trl, version
from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy, fused_linear_log_probs


class NotOfferedError(Exception):
    """The package does not offer what a check needs. Nothing was run, and the answer is not marked as checked."""


@dataclass(frozen=True)
class Peer:
    """A loss: `call(x, y, **options)` or `call(h, w, y, **options)`. An option that it does not offer is an error."""

    package: str
    call: Callable[..., Tensor]
    #: Functions that return, for each token, whether its prediction is correct, and its entropy; None if not offered.
    accuracy: Callable[..., Tensor] | None = None
    entropy: Callable[..., Tensor] | None = None
    #: Loss and gradients need Triton, which runs on a CPU only in its interpreter.
    triton: bool = False


def _ours_logits_stats(name: str) -> Callable[..., Tensor]:
    return lambda x, y: getattr(fused_cross_entropy(x, y, return_stats="differentiable")[1], name)


def _ours_linear_accuracy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fused_linear_cross_entropy(h, w, y, return_stats=True)[1].correct


def _ours_linear_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fused_linear_log_probs(h, w, y, return_entropy=True)[1]


def _torch_linear(h: Tensor, w: Tensor, y: Tensor, **options: Any) -> Tensor:
    """PyTorch's loss with the option that saves memory. Where it is not implemented, PyTorch warns and ignores it."""
    chunked = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(h, w, y, options=chunked, **options)


@contextmanager
def as_in_kernels() -> Iterator[None]:
    """Adds two things to Triton's interpreter that Liger's kernels need.

    A floating point argument becomes a scalar, as in a compiled kernel; the interpreter leaves it a Python number. A
    formula replaces `tanh` of NVIDIA's device library.
    """
    from liger_kernel.ops import cross_entropy
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            scalar = interpreter.TensorHandle(numpy.array([argument], numpy.float32), interpreter.tl.float32)
            return interpreter.tl.tensor(scalar, interpreter.tl.float32)
        return convert(argument)

    def tanh(x: Any) -> Any:
        return 2 * interpreter.tl.sigmoid(2 * x) - 1

    with mock.patch.object(interpreter, "_implicit_cvt", converted), mock.patch.object(cross_entropy, "tanh", tanh):
        yield


def _liger(name: str, **names: str) -> Callable[..., Any]:
    function = imported("liger_kernel.transformers.functional", name)

    def call(*operands: Tensor, **options: Any) -> Any:
        renamed = {{"z_loss": "lse_square_scale", **names}.get(key, key): value for key, value in options.items()}
        if "TRITON_INTERPRET" not in os.environ or torch.compiler.is_compiling():
            return function(*operands, **renamed)
        with as_in_kernels():
            return function(*operands, **renamed)

    return call


def _liger_accuracy(name: str) -> Callable[..., Tensor]:
    call = _liger(name)
    return lambda *operands: call(*operands, reduction="none", return_token_accuracy=True).token_accuracy


def _trl() -> Callable[..., Any]:
    """TRL's loss as its trainers call it: for the kept tokens only, with the reduction done afterwards."""
    log_probs_of = trl()

    def call(
        h: Tensor, w: Tensor, y: Tensor, *, ignore_index: Any = -100, reduction: str = "mean",
        linear_bias: Tensor | None = None, softcap: float | None = None, outputs: tuple[str, ...] = (), **options: Any,
    ) -> Any:  # fmt: skip
        if options:
            raise NotOfferedError("there is no such option")
        if not isinstance(ignore_index, int):
            raise NotOfferedError("the trainers ignore one id, -100")
        if y.is_floating_point():
            raise NotOfferedError("targets are integers")
        kept = y != ignore_index
        log_probs, *more = log_probs_of(h[kept], w, y[kept], bias=linear_bias, softcap=softcap, outputs=outputs)
        if outputs:
            return next(value for value in more if value is not None)
        if reduction == "none":
            return torch.zeros(y.shape).masked_scatter(kept, -log_probs)
        return -log_probs.sum() / kept.sum().clamp(min=1)

    return call


def logits() -> Iterator[Peer]:
    """The losses of logits that are installed."""
    yield Peer("fused_ignore_ce", fused_cross_entropy, _ours_logits_stats("correct"), _ours_logits_stats("entropy"))
    yield Peer("PyTorch", F.cross_entropy)
    if version("liger-kernel"):
        name = "liger_cross_entropy"
        yield Peer("Liger", _liger(name), _liger_accuracy(name), triton=True)


def linear() -> Iterator[Peer]:
    """The losses from hidden states that are installed."""
    yield Peer("fused_ignore_ce", fused_linear_cross_entropy, _ours_linear_accuracy, _ours_linear_entropy)
    if hasattr(F, "linear_cross_entropy"):  # from PyTorch 2.13 on
        yield Peer("PyTorch", _torch_linear)
    if version("liger-kernel"):
        name = "liger_fused_linear_cross_entropy"
        call = _liger(name, linear_bias="bias", weight="ce_weight")
        yield Peer("Liger", call, _liger_accuracy(name), triton=True)
    if version("trl"):
        call = _trl()
        accuracy, entropy = (functools.partial(call, outputs=(name,)) for name in ("is_top1", "entropy"))
        yield Peer("TRL", call, accuracy, entropy)


PEERS: dict[str, Callable[[], Iterator[Peer]]] = {"logits": logits, "linear": linear}
