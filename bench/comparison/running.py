"""Runs the checks: one cell of the tables for each row, kind of loss and package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .models import patchers
from .peers import PEERS
from .rows import ALL, Row

Cell = dict[str, str]


def subjects(kind: str) -> list[tuple[str, tuple[Any, ...]]]:
    """The packages that are installed and have a loss of a kind, with a check's arguments."""
    if kind == "package":
        return []
    if kind == "models":
        return [(patcher.package, (patcher,)) for patcher in patchers()]
    return [(peer.package, (peer, kind)) for peer in PEERS[kind]()]


def answer(row: Row, arguments: tuple[Any, ...]) -> tuple[str, str]:
    """A "yes", with the warning of a loss that takes another way; or a "no" and the reason."""
    assert row.check is not None
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row.check(*arguments)
    except Exception as e:
        line = (str(e).strip().splitlines() or [""])[0]
        if "unexpected keyword argument" in line:
            return "no", "there is no such option"
        return "no", line if isinstance(e, AssertionError) else f"{type(e).__name__}: {line}"
    told = [str(warning.message) for warning in caught if "options`` ignored" in str(warning.message)]
    return "yes", told[0].partition(";")[0].replace("``", "") if told else ""


def cells(rows: tuple[Row, ...] = ALL) -> Iterator[Cell]:
    every = {kind: subjects(kind) for kind in ("logits", "linear", "models", "package")}
    for row in rows:
        for kind in row.kinds:
            about = {"question": row.question, "kind": kind}
            for package, arguments in every[kind]:
                found, why = answer(row, arguments)
                yield about | {"package": package, "answer": found, "why": why, "basis": "checked"}
            for package, (found, why) in row.stated.get(kind, {}).items():
                yield about | {"package": package, "answer": found, "why": why, "basis": "stated"}
