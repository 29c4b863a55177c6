"""Who may be timed: a loss that is right, at a cost that the run can afford."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .providers import PROVIDERS, Provider
from .workload import Case, tensors

#: Relative to the largest true value: as far as PyTorch's own loss in that dtype may be from float64, and some.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-4, torch.float64: 1e-10}

#: Not 1, which a loss may take for granted.
UPSTREAM = 0.5

#: A loss that takes so many times the baseline's time in the probe is not measured at full size.
SLOWEST = 8.0

#: Sizes that every peer accepts; several rows are ignored.
SMALL = {"logits": (64, 1000, 0), "linear": (64, 1000, 64)}
PROBE = {"logits": (256, 8192, 0), "linear": (256, 8192, 256)}


@dataclass(frozen=True)
class Verdict:
    """On a provider in a dtype. Only "green" is timed."""

    provider: str
    kind: str
    dtype: str
    status: str  # "green", "red", "slow" or "skipped"
    reason: str = ""
    probe: float | None = None  # time relative to the baseline's

    def record(self) -> dict[str, Any]:
        return asdict(self)


def judge(provider: Provider, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Skipped with a reason, or compared with the plain path in float64, then tried on a shape of medium size."""
    of = (provider.name, provider.kind, str(dtype).removeprefix("torch."))
    reason = provider.missing(device, dtype)
    if reason is not None:
        return Verdict(*of, "skipped", reason)
    try:
        wrong = fault(provider, device, dtype)
        if wrong is not None:
            return Verdict(*of, "red", wrong)
        ratio = _seconds(provider, device, dtype) / _seconds(PROVIDERS[provider.kind][0], device, dtype)
    except Exception as e:
        return Verdict(*of, "red", one_line(e))
    if ratio > SLOWEST:
        sizes = "x".join(str(size) for size in PROBE[provider.kind] if size)
        return Verdict(*of, "slow", f"{ratio:.0f} times the plain path's time at {sizes}", ratio)
    return Verdict(*of, "green", probe=ratio)


def one_line(error: Exception) -> str:
    """An error as a reason in a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].rstrip(": ")


def fault(provider: Provider, device: torch.device, dtype: torch.dtype) -> str | None:
    """What of its loss or gradients differs from float64; None if nothing does."""
    *inputs, target = tensors(_case(provider, SMALL, dtype), device)
    wide = [x.detach().double().requires_grad_() for x in inputs]  # before they are overwritten
    true_loss = F.cross_entropy(wide[0] if len(wide) == 1 else F.linear(*wide), target)
    true = (true_loss, *torch.autograd.grad(true_loss * UPSTREAM, wide))
    loss = provider.build()(*inputs, target)
    found = (loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, UPSTREAM)))
    names = ("loss", "gradient of logits") if len(inputs) == 1 else ("loss", "gradient of hidden", "gradient of weight")
    for name, ours, gt in zip(names, found, true, strict=True):
        error, scale = (ours.double() - gt).abs().max().item(), gt.abs().max().item()
        if not error <= TOLERANCE[dtype] * scale:  # not so for NaN
            return f"{name} is off by {error:.2e}, the largest true value is {scale:.2e}"
    return None


def _seconds(provider: Provider, device: torch.device, dtype: torch.dtype) -> float:
    """The better of two, after a first."""
    *inputs, target = tensors(_case(provider, PROBE, dtype), device)
    loss, seconds = provider.build(), []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(loss(*inputs, target), inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _case(provider: Provider, sizes: dict[str, tuple[int, int, int]], dtype: torch.dtype) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case("gate", provider.kind, *sizes[provider.kind], 0.5, name, "both")
