"""Reads result files for the pages, and formats their figures as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
from pandas import DataFrame

from .machine import RESULTS

Row = dict[str, Any]

#: What result files of other commands than `bench.run` begin with, and the commands.
COMMANDS = {
    name: f"bench.{name}" for name in ("distributed", "distillation", "proofs", "comparison", "tune", "gpu", "budgets")
} | {
    "predictions": "bench.proofs.predicting",
    "traffic": "bench.proofs.traffic",
    "one_passes": "bench.proofs.one_passes",
}


class Results:
    """Result files by command and then by name, the newest first. Quick runs are left out."""

    def __init__(self, folder: Path = RESULTS) -> None:
        read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        self.files: dict[str, dict[str, Row]] = {command: {} for command in ("run", *COMMANDS)}
        for name, result in sorted(read.items(), key=lambda item: item[1]["header"]["date"], reverse=True):
            if not name.endswith("-quick"):
                first = name.partition("-")[0]
                self.files[first if first in COMMANDS else "run"][name] = result

    def newest(self, command: str, section: str) -> tuple[str, Row]:
        """Name and content of a command's newest result in which a section is not empty."""
        for name, result in self.files[command].items():
            if result[section]:
                return name, result
        raise SystemExit(f"no result in bench/results has {section}: python -m {COMMANDS.get(command, 'bench.run')}")

    def newest_proofs(self) -> tuple[str, Row]:
        """The newest result of `bench.proofs` that compiled all kernels, or else the newest that compiled some.

        It may be a file of its own or a part of a result of `bench.run`.
        """
        parts = {
            name: result["proofs"] | {"header": result["header"]}
            for name, result in self.files["run"].items()
            if result.get("proofs")
        }
        runs = (self.files["proofs"] | parts).items()
        if not runs:
            raise SystemExit("no result in bench/results has proofs: python -m bench.proofs")
        return max(runs, key=lambda run: (not run[1]["quick"], run[1]["header"]["date"]))


def table(cells: DataFrame, head: Sequence[str]) -> str:
    """A table as Markdown, with `head` above the columns."""
    return cells.to_markdown(headers=["", *head], tablefmt="github", disable_numparse=True)


def written(values: Any, form: Callable[[Any], str]) -> Any:
    """A series or a frame as text, with a dash for what was not measured."""
    return values.map(lambda value: form(value) if pandas.notna(value) else "-")


def size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:.0f} MiB"


def code(name: str) -> str:
    """A loss's name, set as code where it is an expression."""
    return f"`{name}`" if "(" in name else name


def link(name: str) -> str:
    """A link to a result file."""
    return f"[{name}](bench/results/{name}.json)"


def embedded(name: str, text: str) -> str:
    """A picture that `bench.figures` draws."""
    return f"![{text}](docs/pictures/{name}.png)"


def where(header: Row) -> str:
    """The machine, PyTorch's version, date and commit of a run."""
    return heading(header, f"PyTorch {header['versions']['torch']}")


def heading(header: Row, *more: str) -> str:
    """The machine, date and commit of a run, and whatever `more` adds."""
    cores = f"{header['cores']} cores of an " if header["kind"] == "cpu" else ""
    return ", ".join([f"{cores}{header['device']}", *more, header["date"], f"commit {header['commit'][:7]}"])
