"""All losses on all cases, side by side: `pytest bench --benchmark-only`, and `-k "logits and both"` for a part."""

from __future__ import annotations

import math
import time

import pytest
import torch

from bench.speed.gate import NO_ROOM
from bench.speed.providers import PROVIDERS
from bench.speed.side_by_side import measure, row, timer_of
from bench.speed.workload import DEVICE, Base, cases


@pytest.mark.benchmark(timer=timer_of(DEVICE))
@pytest.mark.parametrize("case", cases(DEVICE), ids=str)
def test_speed(benchmark, case, verdict, record, pytestconfig):
    if time.time() >= pytestconfig.getoption("--deadline", math.inf):
        record("left out", f"speed: {case}")
        pytest.skip("left out: the time was up")
    # Where one size is varied, every shape would be compiled anew.
    providers = [p for p in PROVIDERS[case.kind] if not (p.compiled and case.shape in Base._fields)]
    verdicts = {provider: verdict(case.kind, provider.name, case.dtype) for provider in providers}
    failed = [f"{provider.name}: {judged.reason}" for provider, judged in verdicts.items() if judged.status == "red"]
    green = [provider for provider, judged in verdicts.items() if judged.status == "green"]
    benchmark.group = f"{case}, {DEVICE}, {torch.get_num_threads()} threads"
    seconds = measure(case, green, DEVICE, benchmark)
    for provider in green:
        own = seconds[provider.name]
        if not isinstance(own, str):
            record("rows", row(case, provider, seconds))
        elif "OutOfMemoryError" in own:
            record("left out", f"speed: {case}: {provider.name}: {NO_ROOM}")
        else:
            record("failed", f"speed: {provider.name}, {case}: {own}")
            failed.append(f"{provider.name}: {own}")
    benchmark.extra_info["seconds"] = {name: own for name, own in seconds.items() if isinstance(own, list)}
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
