"""The suite's options, its tables, and a record of every measurement for `bench.run`, one line of JSON each."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.stats import Stats

from bench.speed.gate import Verdict, judge
from bench.speed.providers import named
from bench.speed.workload import DEVICE


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--deadline", type=float, default=math.inf, help="nothing is started after these seconds since the epoch"
    )
    group.addoption("--records", type=Path, help="append a line of JSON for everything measured, skipped or left out")


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[[str, Any], None]:
    """Appends an entry for a table of the result file at once, so that a crash loses nothing measured before."""
    path = pytestconfig.getoption("--records", None)

    def append(table: str, entry: Any) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps([table, entry]) + "\n")

    return append


@pytest.fixture(scope="session")
def verdict(record: Callable[[str, Any], None]) -> Callable[[str, str, str], Verdict]:
    """The gate's verdict. Every loss passes the gate once in every dtype, before it is timed."""

    @cache
    def judged(kind: str, name: str, dtype: str) -> Verdict:
        found = judge(named(kind, name), DEVICE, dtype)
        record("gates", found._asdict())
        if found.status != "green":
            warnings.warn(f"not timed, {found.status}: {name} ({kind}, {dtype}): {found.reason}", stacklevel=1)
        return found

    return judged


def pytest_benchmark_group_stats(benchmarks: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A table for every case with a line for every loss: pytest-benchmark's own statistics of that loss's rounds."""
    tables = []
    for measured in benchmarks:
        lines = []
        for name, seconds in measured["extra_info"].get("seconds", {}).items():
            stats = Stats()
            stats.data.extend(seconds)
            lines.append(measured | stats.as_dict() | {"name": name})
        if lines:  # none for a case that an error interrupted
            tables.append((measured["group"], lines))
    return tables
