"""Runs a launch on a device and takes its time, once its results are those of the arithmetic launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch

from bench.speed.workload import Case, tensors
from fused_ignore_ce.kernels import cross_entropy
from fused_ignore_ce.kernels.launch import Launch
from fused_ignore_ce.rows import Upstream

from .search import Point

OPTIONS = SimpleNamespace(ignore_index=-100, label_smoothing=0.0, softcap=None, logit_scale=1.0, z_loss=0.0)

#: A launch is timed so often, and gets the median.
ROUNDS = 12

#: Losses are compared in every row, gradients in so many of the first and of the last rows.
COMPARED = 32

#: Other tiles add in another order: losses of float32 sums, and gradients of 16 bits, may differ by so much.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2**-7

#: The time of a function in seconds, measured on the device.
Timer = Callable[[Callable[[], object]], float]


class Trials:
    """A clock for the search. The tensors of a shape are made once, for all of its points."""

    def __init__(self, device: torch.device, timer: Timer) -> None:
        self.device = device
        self.timer = timer
        self.shape: tuple[int, int] | None = None
        self.point: Point | None = None

    def __call__(self, point: Point, launch: Launch) -> float | str:
        """The first launch of a point is the reference of those that follow."""
        try:
            run = self.function(point, launch)
            found = self.compared(point, run)
            if point != self.point:
                self.reference, self.point = found, point
            elif wrong := difference(found, self.reference):
                return wrong
            return self.timer(run)
        except RuntimeError as error:  # Triton's OutOfResources, or no memory
            return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

    def function(self, point: Point, launch: Launch) -> Callable[[], object]:
        """The call of the launcher, which only launches."""
        self._make(point)
        x, target = self.x, self.target
        if point.operation == "forward":
            return lambda: cross_entropy.forward(x, target, None, None, OPTIONS, launch=launch)
        if point.operation == "backward":
            saved = cross_entropy.Saved(self.rows[2], self.rows[3], None)
            return lambda: cross_entropy.backward(
                self.upstream, x, target, None, None, saved, OPTIONS, dx=self.dx, dprobs=None, launch=launch
            )
        return lambda: cross_entropy.forward_backward(
            self.upstream, x, target, None, None, OPTIONS, dx=self.dx, launch=launch
        )

    def _make(self, point: Point) -> None:
        if self.shape == (point.N, point.V):
            return
        self.shape = self.x = self.dx = self.rows = None  # freed before others are made
        logits, self.target = tensors(Case("tune", "logits", point.N, point.V, 0, 0.0, "bfloat16", "both"), self.device)
        self.x = logits.detach()[None]
        self.dx = torch.empty_like(self.x)
        self.rows = cross_entropy.forward(self.x, self.target, None, None, OPTIONS)
        scale = torch.full((), 1 / point.N, dtype=torch.float32, device=self.device)
        self.upstream = Upstream(scale)
        self.shape = point.N, point.V

    def compared(self, point: Point, run: Callable[[], object]) -> dict[str, torch.Tensor]:
        """What a launch computes, in memory that held NaN before."""
        ends = [slice(0, COMPARED), slice(-COMPARED, None)]
        for end in ends:
            self.dx[0, end].fill_(float("nan"))
        rows = run()
        found = {} if point.operation == "backward" else {"loss": rows[0].clone()}
        if point.operation != "forward":
            # In units of the upstream gradient, of which a row's gradient has at most one.
            found["gradient"] = torch.cat([self.dx[0, end] for end in ends]).float() / self.upstream.dloss
        return found


def difference(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> str | None:
    """How results differ; None if they do not."""
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("gradient", GRADIENT_TOLERANCE)):
        if name in reference:
            error = (found[name] - reference[name]).abs().max().item()
            largest = reference[name].abs().max().item()
            if not error <= tolerance * largest:  # the comparison is false for NaN
                return f"wrong: {name} differs by {error:.2e} from the arithmetic launch's, largest {largest:.2e}"
    return None


def cuda_timer(run: Callable[[], object]) -> float:
    """The median over rounds between which the L2 cache is overwritten."""
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
