"""Runs the checks: one cell of the tables for each row, kind of loss and package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .models import patchers
from .peers import PEERS, NotOfferedError
from .rows import ALL, Row

Cell = dict[str, str]


def subjects(kind: str) -> list[tuple[str, tuple[Any, ...]]]:
    """The packages that are installed and have a loss of a kind, with a check's arguments."""
    if kind == "package":
        return []
    if kind == "models":
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
        line = (str(e).strip().splitlines() or [""])[0]
        if "unexpected keyword argument" in line:
            line = "there is no such option"
        elif not isinstance(e, AssertionError):
            line = f"{type(e).__name__}: {line}"
        return {"answer": "no", "why": line, "basis": "checked"}
    told = [str(warning.message) for warning in caught if "options`` ignored" in str(warning.message)]
    why = told[0].partition(";")[0].replace("``", "") if told else ""
    return {"answer": "yes", "why": why, "basis": "checked"}


def cells(rows: tuple[Row, ...] = ALL) -> Iterator[Cell]:
    every = {kind: subjects(kind) for kind in ("logits", "linear", "models", "package")}
    for row in rows:
        for kind in row.kinds:
            about = {"question": row.question, "kind": kind}
            for package, arguments in every[kind]:
                yield about | {"package": package} | answer(row, arguments)
            for package, (found, why) in row.stated.get(kind, {}).items():
                yield about | {"package": package, "answer": found, "why": why, "basis": "stated"}
