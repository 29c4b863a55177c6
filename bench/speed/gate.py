"""The gate: a loss may be timed if it is right, and cheap enough for the run to afford."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

from bench import truth
from bench.machine import one_line

from .providers import PROVIDERS, Loss, Provider
from .workload import Base, case_of, tensors

#: The largest error, relative to the largest true value: what PyTorch's own loss in that dtype has, with a margin.
TOLERANCE = {"bfloat16": 2**-7, "float32": 1e-4}

#: The upstream gradient. It is not 1, so that a loss that ignores it fails.
UPSTREAM = 0.5

#: Why a loss that did not fit has no figure. It is listed as left out, not as failed.
NO_ROOM = "the device has too little memory"

#: A loss whose time in the probe is more than this multiple of the baseline's is not measured at full size.
SLOWEST = 8.0

#: The sizes at which results are compared, which every peer accepts, and at which the cost is probed.
SMALL, PROBE = Base(64, 1000, 64), Base(256, 8192, 256)


class Verdict(NamedTuple):
    """The gate's judgement of a loss in a dtype. Only a loss that is "green" is timed."""

    provider: str
    kind: str
    dtype: str
    status: str  # "green", "red", "slow" or "skipped"
    reason: str = ""
    probe: float | None = None  # time relative to the baseline's


def judge(provider: Provider, device: torch.device, dtype: str) -> Verdict:
    """Skips a loss that cannot run here. Compares any other with the plain path in float64, then probes its cost."""
    subject = (provider.name, provider.kind, dtype)
    reason = provider.missing(device, dtype)
    if reason is not None:
        return Verdict(*subject, "skipped", reason)
    try:
        wrong = fault(provider, device, dtype)
        if wrong is not None:
            return Verdict(*subject, "red", wrong)
        ratio = _probe(provider, device, dtype)
    except Exception as e:
        return Verdict(*subject, "red", one_line(e))
    if ratio > SLOWEST:
        sizes = "x".join(map(str, PROBE if provider.kind == "linear" else PROBE[:2]))
        return Verdict(*subject, "slow", f"{ratio:.0f} times the plain path's time at {sizes}", ratio)
    return Verdict(*subject, "green", probe=ratio)


def fault(provider: Provider, device: torch.device, dtype: str) -> str | None:
    """Says how the loss or a gradient differs from float64; None if neither does."""
    *inputs, target = tensors(case_of("gate", provider.kind, SMALL, 0.5, dtype, "both"), device)
    wanted = truth.expected(inputs, target, upstream=UPSTREAM)  # before a loss can overwrite its inputs
    loss = provider.build()(*inputs, target)
    found = [loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, UPSTREAM))]
    names = ("loss", "gradient of logits") if len(inputs) == 1 else ("loss", "gradient of hidden", "gradient of weight")
    faults = (truth.fault(*each, TOLERANCE[dtype]) for each in zip(names, found, wanted, strict=True))
    return next(filter(None, faults), None)


def _probe(provider: Provider, device: torch.device, dtype: str) -> float:
    """Time of forward and backward relative to the baseline's. Each is the best of three: the machine may be busy."""
    baseline = PROVIDERS[provider.kind][0]
    if provider == baseline:
        return 1.0
    *inputs, target = tensors(case_of("gate", provider.kind, PROBE, 0.5, dtype, "both"), device)

    def seconds(loss: Loss) -> float:
        names = {"run": lambda: torch.autograd.grad(loss(*inputs, target), inputs)}
        timer = Timer("run()", globals=names, num_threads=torch.get_num_threads())
        return min(timer.timeit(1).median for _ in range(3))

    return seconds(provider.build()) / seconds(baseline.build())
