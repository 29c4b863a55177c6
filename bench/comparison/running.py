"""Runs the checks: one cell of the tables for each row, kind of loss and package."""

from __future__ import annotations

import json
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.packages import version

from .models import patchers
from .peers import PEERS, NotOfferedError
from .rows import ALL, Row

Cell = dict[str, str]


def subjects(kind: str) -> list[tuple[str, tuple[Any, ...]]]:
    """The packages that are installed and have a loss of a kind, with a check's arguments."""
    if kind == "package":
        return []
    if kind == "models":
        if version("transformers") is None:
            return []
        return [(patcher.package, (patcher,)) for patcher in patchers()]
    return [(peer.package, (peer, kind)) for peer in PEERS[kind]()]


def answer(row: Row, arguments: tuple[Any, ...]) -> Cell:
    """Runs a row's check: "yes", with the warning if the loss ignored its options, or "no", with the reason."""
    assert row.check is not None
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row.check(*arguments)
    except NotOfferedError as e:
        return {"answer": "no", "why": str(e), "basis": "stated"}
    except Exception as e:
        line = (str(e).strip().splitlines() or [f"{type(e).__name__} without a message"])[0]
        if "unexpected keyword argument" in line:
            line = "there is no such option"
        elif not isinstance(e, AssertionError):
            line = f"{type(e).__name__}: {line}"
        return {"answer": "no", "why": line, "basis": "checked"}
    told = [str(warning.message) for warning in caught if "options`` ignored" in str(warning.message)]
    why = told[0].partition(";")[0].replace("``", "") if told else ""
    return {"answer": "yes", "why": why or getattr(arguments[0], "note", ""), "basis": "checked"}


def cells(rows: tuple[Row, ...] = ALL, only: str | None = None) -> Iterator[Cell]:
    """The cells of all packages, or of one. Where an answer is stated, as of code for a GPU, nothing is run."""
    every = {kind: subjects(kind) for kind in ("logits", "linear", "models", "package")}
    for row in rows:
        for kind in row.kinds:
            about = {"question": row.question, "kind": kind}
            stated = row.stated.get(kind, {})
            for package, arguments in every[kind]:
                if package not in stated and only in (None, package):
                    yield about | {"package": package} | answer(row, arguments)
            for package, (found, why) in stated.items():
                if only is None and found:
                    yield about | {"package": package, "answer": found, "why": why, "basis": "stated"}


def elsewhere(interpreter: str) -> dict[str, Any]:
    """PyTorch's cells with the release that another interpreter has."""
    with tempfile.TemporaryDirectory() as folder:
        command = [interpreter, "-m", "bench.comparison", "--only", "PyTorch", "--out", folder]
        subprocess.run(command, cwd=machine.ROOT, env=machine.environment(), check=True)
        [written] = Path(folder).glob("*.json")
        result = json.loads(written.read_text())
    return {"torch": result["header"]["versions"]["torch"], "cells": result["cells"]}
