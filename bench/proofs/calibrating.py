"""Fits the model's constants to published times of other kernels, and tells how far its predictions are off.

    python -m bench.proofs.calibrating

For every row, the error is also that of constants that were fitted without the row's series: without all times of its
kernel on its chip that were published together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log
from typing import Any

from tabulate import tabulate

from . import lru, published, roof
from .published import Row, Series
from .roof import Constants, Demand, Work


@dataclass(frozen=True)
class Model:
    """The constants of `roof.py`, and the host's seconds for a call of Liger on its authors' machines."""

    constants: Constants
    h100: float
    b200: float

    def seconds(self, sample: Sample) -> float:
        row = sample.row
        host = {"H100": self.h100, "B200": self.b200}[row.chip.name] if row.kernel.host else 0.0
        return host + row.N * row.V * sample.seconds_a_logit(self.constants)

    def error(self, sample: Sample) -> float:
        """0.1 for a prediction that is a tenth too long."""
        return 1e3 * self.seconds(sample) / sample.row.milliseconds - 1


#: Fitted to all published times. The host's times are in no other prediction.
FITTED = Model(roof.FITTED, h100=0.304e-3, b200=0.252e-3)

#: The shares of the cache that are tried.
CACHES = [step / 20 for step in range(6, 21)]


@dataclass(frozen=True)
class Sample:
    """A published time with what its kernel needs; None for a stream."""

    row: Row
    work: Work
    needed: Demand | None

    def seconds_a_logit(self, constants: Constants) -> float:
        row, work = self.row, self.work
        if self.needed is not None:
            return roof.seconds(self.needed, work, row.chip, constants)
        in_flight = min(row.N, row.chip.multiprocessors * row.kernel.threads // work.threads)
        reads, bytes_ = 1.0, row.V * row.itemsize
        if row.kernel.walks == 2:
            reads = lru.reads(in_flight, bytes_, int(constants.cache * row.chip.l2), in_place=True, backwards=False)
        return row.itemsize * (reads + row.kernel.gradient) / (constants.stream * row.chip.bandwidth)


def sample(row: Row) -> Sample:
    counts = row.kernel.counts.get((row.chip.arch, row.itemsize))
    threads = counts.warps * row.chip.warp_size if counts else row.kernel.program
    work = Work(row.N, row.V, row.itemsize, row.N, threads, writes=True, in_place=True, backwards=False)
    return Sample(row, work, roof.demand(counts, work, row.chip) if counts else None)


@cache
def samples() -> list[Sample]:
    return [sample(row) for row in published.rows()]


def fit(known: Sequence[Sample], start: Model = FITTED) -> Model:
    """The model with the least sum of squares of the logarithms of predicted to published times."""

    def misfit(model: Model) -> float:
        return sum(log(1 + model.error(each)) ** 2 for each in known)

    tried = [descend(misfit, replace(start, constants=replace(start.constants, cache=share))) for share in CACHES]
    return min(tried, key=misfit)


def descend(misfit: Callable[[Model], float], model: Model) -> Model:
    """Steps along one constant at a time, except the cache's share, as long as a step of a thousandth helps."""
    least, step = misfit(model), 0.1
    while step > 1e-3:
        better = False
        for factor in (1 + step, 1 / (1 + step)):
            of = model.constants
            for other in (
                replace(model, constants=replace(of, stream=of.stream * factor)),
                replace(model, constants=replace(of, wait=of.wait * factor)),
                replace(model, h100=model.h100 * factor),
                replace(model, b200=model.b200 * factor),
            ):
                if (found := misfit(other)) < least:
                    model, least, better = other, found, True
        step = step if better else step / 2
    return model


def left_out() -> dict[Series, Model]:
    """By series, the model that was fitted to all other series."""
    every = samples()
    return {name: fit([s for s in every if s.row.series != name]) for name in {s.row.series: None for s in every}}


def other_chips() -> Iterator[tuple[str, list[float]]]:
    """For each chip, the errors for its times of a model that knows the other's alone, and its host's time."""
    for name in dict.fromkeys(each.row.chip.name for each in samples()):
        known = fit([each for each in samples() if each.row.chip.name != name])
        model = replace(FITTED, constants=known.constants)
        yield name, [model.error(each) for each in samples() if each.row.chip.name == name]


def summary(errors: Iterable[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"{statistics.median(sizes):.1%} at the median, {max(sizes):.1%} at most"


def shown() -> list[Sample]:
    """The times whose predictions are printed one by one."""
    return [each for each in samples() if each.row.is_shown]


def table(known: Sequence[Sample], without: Mapping[Series, Model] | None = None) -> list[dict[str, Any]]:
    """Published and predicted times; with `without`, also the errors of models that did not know a row's series."""
    return [
        {
            "chip": each.row.chip.name,
            "N x V": f"{each.row.N} x {each.row.V}",
            "kernel": each.row.kernel.name,
            "bytes of a logit": each.row.itemsize,
            "published by": each.row.source,
            "counted in": each.row.kernel.about,
            "published ms": round(each.row.milliseconds, 4),
            "predicted ms": round(1e3 * FITTED.seconds(each), 4),
            "error": round(FITTED.error(each), 4),
            "shown": each.row.is_shown,
        }
        | ({"error if left out": round(without[each.row.series].error(each), 4)} if without else {})
        for each in known
    ]


def main() -> None:
    every, without = samples(), left_out()
    fitted = fit(every)
    print(tabulate(table(every, without), "keys"))
    print("fitted:", fitted, summary(fitted.error(each) for each in every))
    print("in use:", FITTED, summary(FITTED.error(each) for each in every))
    print("left out:", summary(without[each.row.series].error(each) for each in every))
    for name, errors in other_chips():
        print(f"all times of the {name} left out:", summary(errors))


if __name__ == "__main__":
    main()
