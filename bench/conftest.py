"""The suites' options, and what became of every measurement: a line of JSON each, for `bench.run`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gate import Verdict, judge
from bench.providers import named
from bench.workload import DEVICE


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--deadline", type=float, help="epoch seconds after which no measurement is started")
    group.addoption("--records", type=Path, help="append a line of JSON for everything measured, skipped or left out")


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Appends at once: what was measured before a crash is not lost."""
    path = pytestconfig.getoption("--records")

    def append(table: str, /, **fields: Any) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps({"table": table} | fields) + "\n")

    return append


@pytest.fixture(scope="session")
def in_time(pytestconfig: pytest.Config) -> Callable[[], bool]:
    deadline = pytestconfig.getoption("--deadline")
    return lambda: deadline is None or time.time() < deadline


@pytest.fixture(scope="session")
def verdict(record: Callable[..., None]) -> Callable[[str, str, str], Verdict]:
    """Of the gate, which every loss passes once in every dtype before it is timed."""

    @cache
    def judged(kind: str, name: str, dtype: str) -> Verdict:
        found = judge(named(kind, name), DEVICE, getattr(torch, dtype))
        record("gate", **found.record())
        return found

    return judged


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Each median as a ratio to the baseline that took turns with it."""
    groups: dict[str, list] = {}
    session = getattr(config, "_benchmarksession", None)
    for measured in session.benchmarks if session else []:
        if "ratio" in measured.extra_info:
            groups.setdefault(measured.group, []).append(measured.extra_info)
    for group, rows in groups.items():
        terminalreporter.write_sep("-", f"ratio to the first: {group}")
        for row in rows:
            terminalreporter.write_line(f"{row['provider']:44} {row['ms']['p50']:9.1f} ms {row['ratio']:7.2f}")
