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
from fused_ignore_ce import (
    fused_cross_entropy,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_log_probs,
)


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
    #: Returns the mean, and beside it the loss of each token.
    token_loss: Callable[..., tuple[Tensor, Tensor]] | None = None
    #: The same loss with the option, if it needs one, that leaves the logits of 16-bit operands unrounded.
    unrounded: Callable[..., Tensor] | None = None
    #: The same loss with the option that computes the gradient along with it.
    one_pass: Callable[..., Tensor] | None = None
    #: The generalised Jensen-Shannon divergence: `distil(h, w, teacher_h, teacher_w, y, beta=..., alpha=...)`.
    distil: Callable[..., Tensor] | None = None
    #: What a table says beside a yes: the part of the package that was run.
    note: str = ""
    #: Loss and gradients need Triton, which runs on a CPU only in its interpreter.
    triton: bool = False


def _ours_logits_stats(name: str) -> Callable[..., Tensor]:
    return lambda x, y: getattr(fused_cross_entropy(x, y, return_stats="differentiable")[1], name)


def _ours_linear_accuracy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fused_linear_cross_entropy(h, w, y, return_stats=True)[1].correct


def _ours_linear_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return fused_linear_log_probs(h, w, y, return_entropy=True)[1]


def _ours_token_loss(*operands: Tensor) -> tuple[Tensor, Tensor]:
    loss = fused_cross_entropy if len(operands) == 2 else fused_linear_cross_entropy
    mean, stats = loss(*operands, return_stats=True)
    return mean, stats.token_loss


def _ours_distil(*operands: Tensor, **options: Any) -> Any:
    return fused_linear_distillation_loss(*operands, divergence="jsd", **options)


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


def _trl_token_loss(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The fused head of TRL's trainers returns the log-probabilities that its loss is the mean of."""
    kept = _trl()(h, w, y, reduction="none")
    return kept.sum() / (y != -100).sum(), kept


def _liger_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    scaled = imported(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
    )
    return scaled.apply(h, w, y, return_entropy=True)[1]


def _liger_distil(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Liger's kernel; with hard labels beside, its code in PyTorch, which has them."""
    if alpha == 1:
        with as_in_kernels():
            return imported("liger_kernel.transformers.functional", "liger_fused_linear_jsd")(h, w, th, tw, y, beta)
    chunked = imported("liger_kernel.chunked_loss.functional", "liger_fused_linear_jsd")
    return chunked(h, w, th, tw, y, None, None, 1 - alpha, alpha, beta, -100, 1.0, False)


def _trl_distil(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, *, beta: float, alpha: float) -> Tensor:
    """As TRL's `DistillationTrainer` calls it: for the kept tokens only."""
    if alpha != 1:
        raise NotOfferedError("its trainer mixes in no hard labels")
    kept = y != -100
    function = imported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    return function.apply(h[kept], w, None, th[kept], tw, None, beta)[0].mean()


def _cce(
    h: Tensor, w: Tensor, y: Tensor, *, linear_bias: Tensor | None = None, z_loss: float = 0.0, **options: Any
) -> Any:
    """CCE's code in PyTorch, uncompiled. Its kernels need a GPU."""
    with torch.compiler.set_stance("force_eager"):
        loss = imported("cut_cross_entropy", "linear_cross_entropy")
        if linear_bias is not None:
            options["bias"] = linear_bias
        if not z_loss:
            return loss(h, w, y, impl="torch_compile", **options)
        value, lse = loss(h, w, y, impl="torch_compile", return_lse=True, **options)
        return value + z_loss * imported("cut_cross_entropy.utils", "compute_z_loss")(lse, y)


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
    yield Peer(
        "fused_ignore_ce", fused_cross_entropy, _ours_logits_stats("correct"), _ours_logits_stats("entropy"),
        _ours_token_loss, one_pass=functools.partial(fused_cross_entropy, grad_in_forward=True),
    )  # fmt: skip
    yield Peer("PyTorch", F.cross_entropy)
    if version("liger-kernel"):
        name = "liger_cross_entropy"
        yield Peer("Liger", _liger(name), _liger_accuracy(name), triton=True)


def linear() -> Iterator[Peer]:
    """The losses from hidden states that are installed."""
    yield Peer(
        "fused_ignore_ce", fused_linear_cross_entropy, _ours_linear_accuracy, _ours_linear_entropy, _ours_token_loss,
        unrounded=functools.partial(fused_linear_cross_entropy, logits_dtype=torch.float32), distil=_ours_distil,
    )  # fmt: skip
    if hasattr(F, "linear_cross_entropy"):  # from PyTorch 2.13 on
        yield Peer("PyTorch", _torch_linear)
    if version("liger-kernel"):
        name = "liger_fused_linear_cross_entropy"
        call = _liger(name, linear_bias="bias", weight="ce_weight")
        yield Peer("Liger", call, _liger_accuracy(name), _liger_entropy, distil=_liger_distil, triton=True)
    if version("trl"):
        call = _trl()
        accuracy, entropy = (functools.partial(call, outputs=(name,)) for name in ("is_top1", "entropy"))
        yield Peer("TRL", call, accuracy, entropy, _trl_token_loss, distil=_trl_distil)
    if version("cut-cross-entropy"):
        yield Peer("CCE", _cce, note='by `impl="torch_compile"`')


PEERS: dict[str, Callable[[], Iterator[Peer]]] = {"logits": logits, "linear": linear}
