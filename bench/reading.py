"""Result files, read for the pages, and the words in which pages speak of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .machine import ROOT

Row = dict[str, Any]

RESULTS = ROOT / "bench" / "results"

#: Beginnings of the names of result files that `bench.run` did not write.
DISTRIBUTED, PROOFS, COMPARISON = "distributed-", "proofs-", "comparison-"
NO_RUNS = (DISTRIBUTED, PROOFS, COMPARISON, "tune-", "gpu-")


class Results:
    """The result files of full runs by name, the newest first, and apart from them those of other commands."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.distributed = sorted(folder.glob(f"{DISTRIBUTED}*.json"))
        self.comparisons = sorted(folder.glob(f"{COMPARISON}*.json"))
        paths = [p for p in folder.glob("*.json") if not p.stem.endswith("-quick")]
        self.files = _newest_first(p for p in paths if not p.stem.startswith(NO_RUNS))
        #: What `bench.proofs` found, by itself or as a part of a full run.
        self.proofs = _newest_first(p for p in paths if p.stem.startswith(PROOFS))
        self.proofs |= {
            name: result["proofs"] | {"header": result["header"]}
            for name, result in self.files.items()
            if result.get("proofs")
        }

    def newest(self, section: str) -> tuple[str, Row]:
        """Name and content of the newest result in which a section is not empty."""
        for name, result in self.files.items():
            if result[section]:
                return name, result
        raise SystemExit(f"no result in bench/results has {section}: python -m bench.run")

    def newest_proofs(self) -> tuple[str, Row] | None:
        """The newest run that compiled all kernels; where there is none, the newest that compiled some."""
        runs = sorted(self.proofs.items(), key=lambda run: (not run[1]["quick"], run[1]["header"]["date"]))
        return runs[-1] if runs else None

    def comparison(self) -> tuple[str, Row]:
        if not self.comparisons:
            raise SystemExit(f"no result in {RESULTS} compares packages: python -m bench.comparison")
        return self.comparisons[-1].stem, json.loads(self.comparisons[-1].read_text())


def _newest_first(paths: Iterable[Path]) -> dict[str, Row]:
    read = {path.stem: json.loads(path.read_text()) for path in paths}
    return dict(sorted(read.items(), key=lambda item: item[1]["header"]["date"], reverse=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:.0f} MiB"


def code(name: str) -> str:
    """A loss's name, set as code where it is an expression."""
    return f"`{name}`" if "(" in name else name


def find(rows: list[Row], **values: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)


def ratio(row: Row | None) -> str:
    return f"{row['ratio']:.2f}" if row and "ratio" in row else "-"


def peak(result: Row, row: Row | None) -> str:
    """The peak memory that was measured for the loss and the sizes of a row."""
    keys = ("kind", "N", "V", "D", "ignored", "dtype", "direction", "provider")
    held = row and find(result["memory"], **{key: row[key] for key in keys})
    return size(held["bytes"]) if held else "-"


def link(name: str) -> str:
    """A link to a result file."""
    return f"[{name}](bench/results/{name}.json)"


def embedded(name: str, text: str) -> str:
    """A picture that `bench.figures` draws."""
    return f"![{text}](docs/pictures/{name}.png)"


def where(header: Row) -> str:
    """The machine, the software and the age of a run."""
    cores = f"{header['cores']} cores of an {header['device']}" if header["kind"] == "cpu" else header["device"]
    versions = f"PyTorch {header['versions']['torch']}"
    return f"{cores}, {versions}, {header['date']}, commit {header['commit'][:7]}"
