"""All losses on all shapes, side by side: `pytest bench --benchmark-only`, `-k "logits and both"`, ...

pytest-benchmark knows rounds of one function. Turns of several are taken first, and then told to it on a clock that
stands still between them.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench.providers import PROVIDERS
from bench.side_by_side import measure, row
from bench.workload import DEVICE, Base, cases


class Replay:
    """A clock that shows what it is told: device time, too, which no clock of the host could show."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Replay()
PAIRS = [
    pytest.param(case, provider, id=f"{case}-{provider.name}")
    for case in cases(DEVICE)
    for provider in PROVIDERS[case.kind]
    # In a sweep, every shape would be compiled anew.
    if not (provider.compiled and case.shape in Base._fields)
]


@pytest.fixture(scope="session")
def seconds(verdict, in_time, record):
    """Of a case: seconds by provider, or None once the time is up. The last case is kept for its other providers."""

    @lru_cache(maxsize=1)
    def measured(case):
        if not in_time():
            record("left out", case=str(case))
            return None
        green = [
            pair.values[1]
            for pair in PAIRS
            if pair.values[0] == case and verdict(case.kind, pair.values[1].name, case.dtype).status == "green"
        ]
        found = measure(case, green, DEVICE)
        record("case", case=str(case))
        return found

    return measured


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # of what is skipped
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_speed(benchmark, case, provider, seconds, verdict, record):
    everyone = seconds(case)
    if everyone is None:
        pytest.skip("left out: the time was up")
    judged = verdict(case.kind, provider.name, case.dtype)
    if judged.status == "red":
        pytest.fail(judged.reason)
    if judged.status != "green":
        pytest.skip(judged.reason)
    own = everyone[provider.name]
    if isinstance(own, str):
        record("failed", case=str(case), provider=provider.name, reason=own)
        pytest.fail(own)
    found = row(case, provider, everyone)
    record("row", **found)
    benchmark.group = f"{case}, {DEVICE}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(found)
    rounds = iter(own)
    benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(own))
