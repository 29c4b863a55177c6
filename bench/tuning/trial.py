"""Runs a launch on a device, and times it if its results are those of the arithmetic launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from bench import truth
from bench.machine import one_line
from bench.speed.workload import Case, tensors
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Saved, Upstream
from fused_ignore_ce.kernels import cross_entropy
from fused_ignore_ce.kernels.launch import Launch

from .search import Point

OPTIONS = LossOptions()

#: How often a launch is timed; its time is the median.
ROUNDS = 12

#: Losses are compared in all rows, gradients in this many of the first and of the last rows.
COMPARED = 32

#: How far losses (float32 sums) and gradients (16 bits) may differ, because other tiles sum in another order.
TOLERANCE = {"loss": 1e-4, "gradient": 2**-7}

#: The time of a function in seconds, measured on the device.
Timer = Callable[[Callable[[], object]], float]


class Rows:
    """Logits of a shape, their forward results, and memory for their gradient."""

    def __init__(self, N: int, V: int, device: torch.device) -> None:
        logits, self.target = tensors(Case("tune", "logits", N, V, 0, 0.0, "bfloat16", "both"), device)
        self.x = logits.detach()[None]
        self.dx = torch.empty_like(self.x)
        _, _, norm, *_ = cross_entropy.forward((self.x, self.target, None, None), OPTIONS)
        self.saved = Saved(norm, None)
        self.scale = torch.full((), 1 / N, dtype=torch.float32, device=device)

    def function(self, operation: str, launch: Launch) -> Callable[[], Any]:
        """A call of the operation's launcher, without arguments."""
        inputs = self.x, self.target, None, None
        upstream = Upstream(self.scale)
        if operation == "forward":
            return lambda: cross_entropy.forward(inputs, OPTIONS, launch=launch)
        if operation == "backward":
            return lambda: cross_entropy.backward(
                upstream, inputs, self.saved, OPTIONS, dx=self.dx, dprobs=None, launch=launch
            )
        return lambda: cross_entropy.forward_backward(upstream, inputs, OPTIONS, dx=self.dx, launch=launch)

    def results(self, operation: str, run: Callable[[], Any]) -> dict[str, Tensor]:
        """What a call computes. Its gradient is written to memory that held NaN before."""
        ends = [self.dx[0, :COMPARED], self.dx[0, -COMPARED:]]
        for end in ends:
            end.fill_(float("nan"))
        rows = run()
        found = {} if operation == "backward" else {"loss": rows[0].clone()}
        if operation != "forward":
            # Divided by the upstream gradient, so that no element is larger than 1.
            found["gradient"] = torch.cat(ends).float() / self.scale
        return found


class Trials:
    """A clock for the search. The tensors of a shape are made once, for all of its points."""

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self.device = device
        self.timer = timer
        self.shape: tuple[int, int] | None = None
        self.rows: Rows | None = None
        self.point: Point | None = None
        self.reference: dict[str, Tensor] = {}

    def __call__(self, point: Point, launch: Launch) -> float | str:
        """Seconds, or why there are none. The first launch of a point is the reference for those that follow."""
        try:
            rows = self._rows_of(point.N, point.V)
            run = rows.function(point.operation, launch)
            found = rows.results(point.operation, run)
            if point != self.point:
                self.reference, self.point = found, point
            elif wrong := difference(found, self.reference):
                return f"wrong: {wrong}"
            return self.timer(run)
        except (RuntimeError, TritonError) as error:
            return one_line(error)

    def _rows_of(self, N: int, V: int) -> Rows:
        if self.rows is None or self.shape != (N, V):
            self.shape, self.rows = None, None  # freed before others are made
            self.rows = Rows(N, V, self.device)
            self.shape = N, V
        return self.rows


def difference(found: dict[str, Tensor], reference: dict[str, Tensor]) -> str | None:
    """How results differ from the arithmetic launch's; None if they do not."""
    faults = (truth.fault(name, found[name], wanted, TOLERANCE[name]) for name, wanted in reference.items())
    return next(filter(None, faults), None)


def cuda_timer(run: Callable[[], object]) -> float:
    """The median of several rounds, in seconds. The L2 cache is overwritten before each."""
    from triton.runtime import driver

    cache = driver.active.get_empty_cache_for_benchmark()
    spans = []
    for _ in range(ROUNDS):
        driver.active.clear_cache(cache)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3
