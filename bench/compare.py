"""How losses are compared: a gate of correctness first, then turns with the baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Loss = Callable[..., Any]


def gradients(loss: Loss, *arguments: Tensor) -> tuple[Tensor, ...]:
    """What is timed: forward and backward, until the device has done it."""
    wanted = [t for t in arguments if t.requires_grad]
    found = torch.autograd.grad(loss(*arguments), wanted)
    if found[0].is_cuda:
        torch.cuda.synchronize()
    return found


def gate(loss: Loss, baseline: Loss, *arguments: Tensor) -> None:
    """Fails unless the loss's gradients are those of the baseline in float64: no speed of a loss that is wrong."""
    wide = [t.detach().double().requires_grad_() if t.requires_grad else t for t in arguments]
    for found, true in zip(gradients(loss, *arguments), gradients(baseline, *wide), strict=True):
        error = (found.double() - true).abs().max()
        assert error <= 2**-7 * true.abs().max(), f"wrong gradient: off by {error}"


def in_turns(benchmark: Any, loss: Loss, baseline: Loss, arguments: tuple[Tensor, ...], rounds: int) -> None:
    """Times the loss, and before each round the baseline: machines change their speed from minute to minute.

    The ratio of the medians goes to the summary.
    """
    seconds = []

    def take_turn() -> None:
        start = time.perf_counter()
        gradients(baseline, *arguments)
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(gradients, args=(loss, *arguments), setup=take_turn, warmup_rounds=1, rounds=rounds)
    benchmark.extra_info["ratio"] = benchmark.stats.stats.median / statistics.median(seconds[1:])
