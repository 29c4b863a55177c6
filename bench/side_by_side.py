"""One case, measured: all losses and the machine's own roof take turns, so that ratios come from the same minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gate import one_line
from .providers import PROVIDERS, Loss, Provider
from .workload import Case, tensors

ROOF = "roof"

#: Rounds of a case: at least, at most, and seconds after which no more are started.
ROUNDS = (3, 15)
SECONDS = 2.5


class Turn(NamedTuple):
    """`run` is timed; what `prepare` makes for it, and what it returns, are not."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Stopwatch:
    """Seconds of a turn.

    On CUDA, between two events, after a buffer four times the L2 cache was written: no loss finds its logits there.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = None
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, turn: Turn) -> float:
        prepared = turn.prepare()
        if self._flush is None:
            start = time.perf_counter()
            result = turn.run(prepared)
            seconds = time.perf_counter() - start
            del result  # which takes time, too
            return seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        turn.run(prepared)
        end.record()
        torch.cuda.synchronize(self._flush.device)
        return begin.elapsed_time(end) / 1e3


def in_turns(turns: dict[str, Turn], clock: Callable[[Turn], float]) -> dict[str, list[float] | str]:
    """Seconds of every round by name; for a turn that raises, the error in its place. The first round is not kept."""
    found: dict[str, list[float] | str] = {}
    for name, turn in turns.items():
        try:
            clock(turn)
            found[name] = []
        except Exception as e:
            found[name] = one_line(e)
    start = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
            break
        for name, seconds in found.items():
            if isinstance(seconds, list):
                seconds.append(clock(turns[name]))
    return found


def turn_of(loss: Loss, case: Case, inputs: list[Tensor], target: Tensor, overwrites: bool) -> Turn:
    """Forward, backward or both, in training: gradients are wanted. A loss that overwrites gets its logits back."""
    original = inputs[0].detach().clone() if overwrites else None

    def restore() -> None:
        if original is not None:
            inputs[0].data.copy_(original)

    def forward() -> Any:
        restore()
        return loss(*inputs, target)

    if case.direction == "forward":
        return Turn(restore, lambda _: loss(*inputs, target))
    if case.direction == "backward":
        return Turn(forward, lambda value: torch.autograd.grad(value, inputs))
    return Turn(restore, lambda _: torch.autograd.grad(loss(*inputs, target), inputs))


def roof_of(case: Case, device: torch.device) -> Turn:
    """The machine at its best: a copy of the logits, or the matrix products of the kept tokens, nothing allocated."""
    dtype = getattr(torch, case.dtype)

    def new(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    if not case.D:
        source, copy = new(case.N, case.V), new(case.N, case.V)
        return Turn(lambda: None, lambda _: copy.copy_(source))
    h, w, x = new(case.kept, case.D), new(case.V, case.D), new(case.kept, case.V)
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def run(_: None) -> None:
        if case.direction != "backward":
            torch.mm(h, w.t(), out=x)
        if case.direction != "forward":
            torch.mm(x, w, out=dh)
            torch.mm(x.t(), h, out=dw)

    return Turn(lambda: None, run)


def least_work(case: Case) -> float:
    """The fewest bytes that a loss of logits moves, or operations of the linear loss's matrix products.

    Forward reads the kept rows; backward reads them and writes every row. Forward is one product of the kept tokens,
    backward two. A loss that computes gradients in forward does the work of both there: compare "both".
    """
    itemsize = getattr(torch, case.dtype).itemsize
    forward, backward = (1, 2) if case.D else (case.kept, case.kept + case.N)
    parts = {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]
    return parts * (2 * case.kept * case.V * case.D if case.D else case.V * itemsize)


def roof_work(case: Case) -> float:
    """What the roof's turn does, in the same unit: a copy reads and writes every logit."""
    return least_work(case) if case.D else 2 * case.N * case.V * getattr(torch, case.dtype).itemsize


@lru_cache(maxsize=16)
def _built(provider: Provider, *shape: object) -> Loss:
    """What is compiled for a shape serves all cases of it, which follow each other."""
    return provider.build()


def measure(case: Case, providers: list[Provider], device: torch.device) -> dict[str, list[float] | str]:
    """Seconds by provider and of the roof, or why there are none. All see the same tensors."""
    *inputs, target = tensors(case, device)
    turns = {}
    for provider in providers:
        loss = _built(provider, case.N, case.V, case.D, case.dtype)
        turns[provider.name] = turn_of(loss, case, inputs, target, provider.overwrites)
    return in_turns(turns | {ROOF: roof_of(case, device)}, Stopwatch(device))


def row(case: Case, provider: Provider, seconds: dict[str, list[float] | str]) -> dict[str, Any]:
    """A line of the result file. Rates are GB/s for logits, TFLOP/s for the linear loss."""
    own = seconds[provider.name]
    assert isinstance(own, list)
    p20, p50, p80 = percentiles(own)
    unit = 1e12 if case.D else 1e9
    found = case._asdict() | {
        "provider": provider.name,
        "rounds": len(own),
        "ms": {"p20": 1e3 * p20, "p50": 1e3 * p50, "p80": 1e3 * p80},
        "rate": least_work(case) / p50 / unit,
    }
    roof, baseline = seconds[ROOF], seconds.get(PROVIDERS[case.kind][0].name)
    if isinstance(roof, list):
        found["roof"] = roof_work(case) / percentiles(roof)[1] / unit
        found["share_of_roof"] = found["rate"] / found["roof"]
    if isinstance(baseline, list):
        found["ratio"] = p50 / percentiles(baseline)[1]
    return found


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, interpolated."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]
