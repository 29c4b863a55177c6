"""Measures one case: all losses and the machine's roof take turns, so that their ratios come from the same minutes.

pytest-benchmark times every turn, but cannot alternate the rounds of several functions. This module adds that.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils.benchmark.utils.timer import timer as synchronized_clock

from bench.machine import one_line

from .providers import PROVIDERS, Loss, Provider
from .workload import Case, tensors

ROOF = "roof"

#: A case takes about this many seconds, within these fewest and most rounds per loss.
SECONDS = 2.5
ROUNDS = (3, 15)

#: By name of the loss, the seconds of every round, or the error that prevented the measurement.
Seconds = dict[str, list[float] | str]


class CudaInstant:
    """A moment on the device's own time line. The difference of two is in seconds, as with a timer's readings."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: CudaInstant) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def timer_of(device: torch.device) -> Callable[[], Any]:
    """The timer that pytest-benchmark reads before and after each turn."""
    return CudaInstant if device.type == "cuda" else time.perf_counter


class Turn(NamedTuple):
    """A function to time. Only `run` is timed; it is given what `prepare` returned."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def cache_clearer(device: torch.device) -> Callable[[], None]:
    """Clears the L2 cache on CUDA, as Triton's `do_bench` does, so that no loss finds its logits in the cache."""
    if device.type != "cuda":
        return lambda: None
    from triton.runtime import driver

    return partial(driver.active.clear_cache, driver.active.get_empty_cache_for_benchmark())


def in_turns(turns: dict[str, Turn], device: torch.device, benchmark: BenchmarkFixture, compiles: bool) -> Seconds:
    """Warms every turn up, leaves out those that raise an error, and has pytest-benchmark time rounds of the others.

    The warm-up tells how many rounds there is time for. With `compiles`, the first turns may compile something; if they
    took long, a second round tells it instead.
    """
    found: Seconds = {}

    def one_round() -> float:
        start = synchronized_clock()
        for name, turn in turns.items():
            if name not in found:
                try:
                    turn.run(turn.prepare())
                except Exception as e:
                    found[name] = one_line(e)
        return synchronized_clock() - start

    seconds = one_round()
    if compiles and seconds > SECONDS / ROUNDS[1]:
        seconds = one_round()
    rounds = min(max(ROUNDS[0], int(SECONDS / seconds)), ROUNDS[1])
    working = [name for name in turns if name not in found]
    following, clear_cache = itertools.cycle(turns[name] for name in working), cache_clearer(device)
    held: list[Any] = []  # a turn's function, what it prepared, its result: freed while nothing is timed

    def prepare() -> None:
        held.clear()
        turn = next(following)
        held.extend([turn.run, turn.prepare()])
        clear_cache()

    def run() -> None:
        timed, prepared = held
        held.append(timed(prepared))

    benchmark.pedantic(run, setup=prepare, rounds=rounds * len(working))
    assert benchmark.stats is not None, "pytest-benchmark is disabled"
    for number, name in enumerate(working):
        found[name] = benchmark.stats.stats.data[number :: len(working)]
    return found


def turn_of(loss: Loss, case: Case, inputs: list[Tensor], target: Tensor, original: Tensor | None = None) -> Turn:
    """Forward, backward or both of a loss in training. Logits that it overwrites are restored from `original`."""

    def prepare() -> Any:
        if original is not None:
            inputs[0].data.copy_(original)
        return loss(*inputs, target) if case.direction == "backward" else None

    def run(value: Any) -> Any:
        value = loss(*inputs, target) if value is None else value
        return value if case.direction == "forward" else torch.autograd.grad(value, inputs)

    return Turn(prepare, run)


def roof_of(case: Case, device: torch.device) -> Turn:
    """The machine's roof: a copy of the logits, or the matrix products of the kept tokens, without any allocation."""
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
    """The fewest bytes that a loss of logits moves, or the operations of the linear loss's matrix products.

    Forward reads the kept rows; backward reads them and writes every row. A linear loss takes one product of the kept
    tokens in forward, and two in backward. A loss that computes gradients in forward does the work of both there, so
    only its figures of "both" compare.
    """
    itemsize = getattr(torch, case.dtype).itemsize
    forward, backward = (1, 2) if case.D else (case.kept, case.kept + case.N)
    parts = {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]
    return parts * (2 * case.kept * case.V * case.D if case.D else case.V * itemsize)


def roof_work(case: Case) -> float:
    """The work of the roof's turn in the same unit: a copy reads and writes every logit."""
    return least_work(case) if case.D else 2 * case.N * case.V * getattr(torch, case.dtype).itemsize


@lru_cache(maxsize=16)
def _built(provider: Provider, *shape: object) -> Loss:
    """Keeps a loss that was compiled for a shape, so that other cases of the shape need not compile it again."""
    return provider.build()


def measure(case: Case, providers: list[Provider], device: torch.device, benchmark: BenchmarkFixture) -> Seconds:
    """The seconds of every provider, on the same tensors, and of the roof."""
    *inputs, target = tensors(case, device)
    turns, built_before = {}, _built.cache_info().misses
    original = inputs[0].detach().clone() if any(provider.overwrites for provider in providers) else None
    for provider in providers:
        loss = _built(provider, case.N, case.V, case.D, case.dtype)
        turns[provider.name] = turn_of(loss, case, inputs, target, original if provider.overwrites else None)
    compiles = _built.cache_info().misses > built_before
    return in_turns(turns | {ROOF: roof_of(case, device)}, device, benchmark, compiles)


def row(case: Case, provider: Provider, seconds: Seconds) -> dict[str, Any]:
    """One row of the result file. Rates are GB/s for logits, TFLOP/s for the linear loss."""
    own = seconds[provider.name]
    assert isinstance(own, list)
    p20, p50, p80 = numpy.percentile(own, (20, 50, 80)).tolist()
    unit = 1e12 if case.D else 1e9
    found = case._asdict() | {
        "provider": provider.name,
        "rounds": len(own),
        "ms": {"p20": 1e3 * p20, "p50": 1e3 * p50, "p80": 1e3 * p80},
        "rate": least_work(case) / p50 / unit,
    }
    roof, baseline = seconds[ROOF], seconds.get(PROVIDERS[case.kind][0].name)
    if isinstance(roof, list):
        found["roof"] = roof_work(case) / numpy.median(roof) / unit
        found["share_of_roof"] = found["rate"] / found["roof"]
    if isinstance(baseline, list):
        found["ratio"] = p50 / numpy.median(baseline)
    return found
