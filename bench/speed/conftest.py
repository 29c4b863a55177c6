"""The suite's options, its tables, and a record of every measurement for `bench.run`: one line of JSON each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.stats import Stats

from bench.speed.gate import Verdict, judge
from bench.speed.providers import named
from bench.speed.workload import DEVICE

VERDICTS = pytest.StashKey[list[Verdict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--deadline", type=float, help="no measurement is started after these seconds since the epoch")
    group.addoption("--records", type=Path, help="append a line of JSON for everything measured, skipped or left out")


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Appends at once, so that a crash loses nothing that was measured before."""
    path = pytestconfig.getoption("--records", None)

    def append(table: str, /, **fields: Any) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps({"table": table} | fields) + "\n")

    return append


@pytest.fixture(scope="session")
def in_time(pytestconfig: pytest.Config) -> Callable[[], bool]:
    deadline = pytestconfig.getoption("--deadline", None)
    return lambda: deadline is None or time.time() < deadline


@pytest.fixture(scope="session")
def verdict(pytestconfig: pytest.Config, record: Callable[..., None]) -> Callable[[str, str, str], Verdict]:
    """The gate's verdict. Every loss passes the gate once in every dtype, before it is timed."""

    @cache
    def judged(kind: str, name: str, dtype: str) -> Verdict:
        found = judge(named(kind, name), DEVICE, getattr(torch, dtype))
        pytestconfig.stash.setdefault(VERDICTS, []).append(found)
        record("gate", **found._asdict())
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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for judged in config.stash.get(VERDICTS, []):
        if judged.status != "green":
            terminalreporter.write_line(
                f"not timed, {judged.status}: {judged.provider} ({judged.kind}, {judged.dtype}): {judged.reason}"
            )
