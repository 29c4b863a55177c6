"""Who is measured, as data: how each loss is called, and why it may not run here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

#: loss(logits, target) or loss(hidden, weight, target): the mean over the rows whose target is not -100.
Loss = Callable[..., Any]

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Provider:
    """A loss, and what it needs. `build` imports it, so that nothing is imported that is not measured."""

    name: str
    kind: str  # "logits" or "linear"
    build: Callable[[], Loss]
    package: str | None = None  # the distribution that has it
    capability: tuple[int, int] | None = None  # the least of a CUDA device; None where any device will do
    dtypes: tuple[torch.dtype, ...] | None = None  # None for all
    attribute: str | None = None  # of torch.nn.functional
    compiled: bool = False  # built for one shape, at its first call
    overwrites: bool = False  # writes its gradient over the logits that it is given

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here; None if nothing is known that keeps it."""
        if self.attribute is not None and not hasattr(F, self.attribute):
            return f"torch {torch.__version__} has no F.{self.attribute}"
        if self.package is not None and version(self.package) is None:
            return f"{self.package} is not installed"
        if self.capability is not None and device.type != "cuda":
            return "needs a CUDA device"
        if self.capability is not None and torch.cuda.get_device_capability(device) < self.capability:
            return f"needs a CUDA device of compute capability {'.'.join(map(str, self.capability))}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"not for {str(dtype).removeprefix('torch.')}"
        return None


def version(package: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiled(loss: Loss) -> Loss:
    """Compiled for one static shape. The compiler forgets the shapes before: past eight it would give up quietly.

    In this process: workers of its own would start, and keep cores busy, while others are timed.
    """
    from torch._inductor import config

    config.compile_threads = 1
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False)


def _plain(x, y):
    return F.cross_entropy(x.float(), y)


def _plain_linear(h, w, y):
    return F.cross_entropy(F.linear(h, w).float(), y)


def _torch_linear() -> Loss:
    from torch.nn import LinearCrossEntropyOptions

    return lambda h, w, y: F.linear_cross_entropy(h, w, y, options=LinearCrossEntropyOptions())


def _liger() -> Loss:
    from liger_kernel.ops import LigerCrossEntropyFunction

    return lambda x, y: LigerCrossEntropyFunction.apply(x, y, None)[0]


def _liger_linear() -> Loss:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return lambda h, w, y: LigerFusedLinearCrossEntropyFunction.apply(h, w, y)[0]


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return cross_entropy


def _quack_linear() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _flash_attn() -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x, y: cross_entropy_loss(x, y)[0].sum() / (y != -100).sum()


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _ours() -> Loss:
    from fused_ignore_ce import fused_cross_entropy

    return fused_cross_entropy


def _ours_linear() -> Loss:
    from fused_ignore_ce import fused_linear_cross_entropy

    return fused_linear_cross_entropy


#: What ratios are relative to comes first: what transformers does.
LOGITS = (
    Provider("F.cross_entropy(x.float(), y)", "logits", lambda: _plain),
    # In float32 it is the first.
    Provider("F.cross_entropy(x, y)", "logits", lambda: F.cross_entropy, dtypes=HALF),
    Provider("torch.compile of the first", "logits", lambda: _compiled(_plain), compiled=True),
    Provider("Liger", "logits", _liger, package="liger-kernel", capability=(7, 0), overwrites=True),
    Provider("QuACK", "logits", _quack, package="quack-kernels", capability=(8, 0)),
    Provider("flash-attn", "logits", _flash_attn, package="flash-attn", capability=(8, 0)),
    Provider("fused_cross_entropy(x, y)", "logits", _ours),
)

LINEAR = (
    Provider("F.cross_entropy(F.linear(h, w).float(), y)", "linear", lambda: _plain_linear),
    Provider(
        "F.cross_entropy(F.linear(h, w), y)", "linear",
        lambda: lambda h, w, y: F.cross_entropy(F.linear(h, w), y), dtypes=HALF,
    ),
    Provider("torch.compile of the first", "linear", lambda: _compiled(_plain_linear), compiled=True),
    Provider(
        "F.linear_cross_entropy(h, w, y, options=...)", "linear", _torch_linear, attribute="linear_cross_entropy"
    ),
    Provider("Liger", "linear", _liger_linear, package="liger-kernel", capability=(7, 0)),
    Provider("CCE", "linear", _cce, package="cut-cross-entropy", capability=(8, 0), dtypes=HALF),
    Provider("QuACK", "linear", _quack_linear, package="quack-kernels", capability=(9, 0), dtypes=HALF),
    Provider("fused_linear_cross_entropy(h, w, y)", "linear", _ours_linear),
)  # fmt: skip

PROVIDERS = {"logits": LOGITS, "linear": LINEAR}


def named(kind: str, name: str) -> Provider:
    """The provider of that name."""
    return next(provider for provider in PROVIDERS[kind] if provider.name == name)
