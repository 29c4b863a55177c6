"""The losses that are measured, as data: how each is called, and why it may not run on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.packages import imported, trl, version
from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy

#: `loss(logits, target)` or `loss(hidden, weight, target)`: the mean over the rows whose target is not -100.
Loss = Callable[..., Any]

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Provider:
    """A loss and what it needs. A peer is imported by `build`, so that only what is measured is imported."""

    name: str
    kind: str  # "logits" or "linear"
    build: Callable[[], Loss]
    package: str | None = None  # the distribution that contains it
    capability: tuple[int, int] | None = None  # the least that a CUDA device must have; None if any device will do
    dtypes: tuple[str, ...] | None = None  # None for all
    attribute: str | None = None  # a function that torch.nn.functional must have
    compiled: bool = False  # built for one shape, at its first call
    overwrites: bool = False  # writes its gradient over the logits that it is given

    def missing(self, device: torch.device, dtype: str) -> str | None:
        """Why the loss cannot run on a device in a dtype; None if no reason is known."""
        if self.attribute is not None and not hasattr(F, self.attribute):
            return f"torch {torch.__version__} has no F.{self.attribute}"
        if self.package is not None and version(self.package) is None:
            return f"{self.package} is not installed"
        if self.capability is not None and device.type != "cuda":
            return "needs a CUDA device"
        if self.capability is not None and torch.cuda.get_device_capability(device) < self.capability:
            return f"needs a CUDA device of compute capability {'.'.join(map(str, self.capability))}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"not for {dtype}"
        return None


def _compiled(loss: Loss) -> Loss:
    """The loss, compiled for one static shape.

    The compiler is reset, because after eight shapes it would silently run the loss uncompiled. It compiles in this
    process, because worker processes would keep cores busy while other losses are timed.
    """
    from torch._inductor import config

    config.compile_threads = 1
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False)


def _plain(x, y):
    return F.cross_entropy(x.float(), y)


def _linear(h, w, y):
    return F.cross_entropy(F.linear(h, w), y)


def _plain_linear(h, w, y):
    return F.cross_entropy(F.linear(h, w).float(), y)


def _torch_linear() -> Loss:
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def _liger(function: str, *more: None) -> Callable[[], Loss]:
    def build() -> Loss:
        apply = imported("liger_kernel.ops", function).apply
        return lambda *operands: apply(*operands, *more)[0]

    return build


def _trl() -> Loss:
    """TRL's loss of the kept tokens alone, as its trainers call it."""
    log_probs = trl()

    def loss(h, w, y):
        kept = y != -100
        return -log_probs(h[kept], w, y[kept])[0].mean()

    return loss


def _flash_attn() -> Loss:
    loss = imported("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda x, y: loss(x, y)[0].sum() / (y != -100).sum()


#: The first of each kind is what transformers computes, and the baseline of all ratios. The last is this package's.
#: QuACK, flash-attn and CCE are called as their published sources say, but were never run from here. Liger's kernels
#: need a CUDA device, and were only interpreted. The gate judges every loss before it is timed.
LOGITS = (
    Provider("F.cross_entropy(x.float(), y)", "logits", lambda: _plain),
    # Not measured in float32, because it is the same as the first there.
    Provider("F.cross_entropy(x, y)", "logits", lambda: F.cross_entropy, dtypes=HALF),
    Provider("torch.compile of the first", "logits", lambda: _compiled(_plain), compiled=True),
    Provider(
        "Liger", "logits", _liger("LigerCrossEntropyFunction", None),
        package="liger-kernel", capability=(7, 0), overwrites=True,
    ),
    Provider(
        "QuACK", "logits", lambda: imported("quack.cross_entropy", "cross_entropy"),
        package="quack-kernels", capability=(8, 0),
    ),
    Provider("flash-attn", "logits", _flash_attn, package="flash-attn", capability=(8, 0)),
    Provider(
        "fused_cross_entropy(x, y, grad_in_forward=True, inplace_backward=True)", "logits",
        lambda: partial(fused_cross_entropy, grad_in_forward=True, inplace_backward=True), overwrites=True,
    ),
    Provider(
        "fused_cross_entropy(x, y, grad_in_forward=True)", "logits",
        lambda: partial(fused_cross_entropy, grad_in_forward=True),
    ),
    Provider("fused_cross_entropy(x, y)", "logits", lambda: fused_cross_entropy),
)  # fmt: skip

LINEAR = (
    Provider("F.cross_entropy(F.linear(h, w).float(), y)", "linear", lambda: _plain_linear),
    Provider("F.cross_entropy(F.linear(h, w), y)", "linear", lambda: _linear, dtypes=HALF),
    Provider("torch.compile of the first", "linear", lambda: _compiled(_plain_linear), compiled=True),
    Provider(
        "F.linear_cross_entropy(h, w, y, options=...)", "linear", _torch_linear, attribute="linear_cross_entropy"
    ),
    Provider(
        "Liger", "linear", _liger("LigerFusedLinearCrossEntropyFunction"),
        package="liger-kernel", capability=(7, 0),
    ),
    Provider("TRL", "linear", _trl, package="trl"),
    Provider(
        "CCE", "linear", lambda: imported("cut_cross_entropy", "linear_cross_entropy"),
        package="cut-cross-entropy", capability=(8, 0), dtypes=HALF,
    ),
    Provider(
        "QuACK", "linear", lambda: imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
        package="quack-kernels", capability=(9, 0), dtypes=HALF,
    ),
    Provider("fused_linear_cross_entropy(h, w, y)", "linear", lambda: fused_linear_cross_entropy),
)  # fmt: skip

PROVIDERS = {"logits": LOGITS, "linear": LINEAR}


def named(kind: str, name: str) -> Provider:
    """The provider of that name."""
    return next(provider for provider in PROVIDERS[kind] if provider.name == name)
