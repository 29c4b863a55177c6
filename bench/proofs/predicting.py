"""Predicts the share of the memory roof, and the time, of this project's kernels and its peers' on every chip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.speed.providers import TRL_CHUNK

from . import chips, peers, roof
from .cases import Case
from .compiling import Job, Proof, Target
from .judging import work

#: What is printed above predictions, wherever they are printed.
NOTE = "Predictions from machine code, not measurements."

ROWS = 8192
VOCABULARIES = (32000, 65536, 128256, 256000)

#: Up to this vocabulary, one pass may read the logits from device memory only once.
READ_ONCE = 65536


@dataclass(frozen=True)
class Row:
    """The prediction for one kernel, at one vocabulary on one chip."""

    library: str
    kernel: str
    V: int
    prediction: roof.Prediction

    @property
    def milliseconds(self) -> float:
        return 1e3 * ROWS * self.V * self.prediction.seconds_a_logit


def every(chip: chips.Chip, quick: bool) -> list[Job]:
    """The kernels to predict on a chip, at every vocabulary. With `quick`, Liger is the only peer."""
    ours = [
        Case(operation, 1, ROWS, V)
        for V in VOCABULARIES
        for operation in ("forward", "backward", "one pass")
    ]  # fmt: skip
    theirs = [case for V in VOCABULARIES for case in peers.every(V) if not case.features]
    theirs = [case for case in theirs if not quick or case.library == "liger_kernel"]
    return [Job(case, Target("cuda", chip.arch, chip.name)) for case in (*ours, *theirs)]


def predict(proofs: Iterable[Proof]) -> list[Row]:
    rows = []
    for proof in proofs:
        if proof.code is None:
            continue  # it did not compile, which is reported as a fault
        case = proof.job.case
        todo = work(proof, ROWS)
        if case.library == "trl":
            # Its launches see one tile of the vocabulary.
            todo = replace(todo, classes=min(case.V, TRL_CHUNK))
        prediction = roof.predict(proof.code, todo, chips.chip(proof.job.target.chip))
        rows.append(Row(case.library, case.operation, case.V, prediction))
    return rows


def faults(rows: list[Row]) -> list[str]:
    """The chips and vocabularies at which this project's one pass reads the logits more than once, but must not."""
    return [
        f"{row.prediction.chip} {row.kernel} V={row.V}: {row.prediction.hbm_reads:.2f} reads from device memory, not 1"
        for row in rows
        if row.library == "fused_ignore_ce" and row.V <= READ_ONCE and row.prediction.hbm_reads > 1.01
    ]


def table(rows: list[Row]) -> str:
    lines = [
        f"{'chip':9} {'V':>6}  {'kernel':28} {'share':>5}  {'bound':17} {'ms':>7}  {'HBM reads':>9} {'threads':>7}"
    ]
    for row in rows:
        p = row.prediction
        name = f"{row.library} {row.kernel}"
        lines.append(
            f"{p.chip:9} {row.V:6}  {name:28} {p.share:5.2f}  {p.limit:17} {row.milliseconds:7.3f}"
            f"  {p.hbm_reads:9.2f} {p.resident_threads:7}"
        )
    return "\n".join(lines)


def milliseconds(rows: list[Row], library: str, kernels: tuple[str, ...], chip: str, V: int) -> float | None:
    """The predicted time of kernels that run one after the other; None if one of them was not predicted."""
    found = {
        row.kernel: row.milliseconds
        for row in rows
        if (row.library, row.prediction.chip, row.V) == (library, chip, V)
    }  # fmt: skip
    return sum(found[kernel] for kernel in kernels) if found.keys() >= set(kernels) else None


def comparison(rows: list[Row]) -> str:
    """A table of milliseconds for forward and backward together: by one pass, by two launches, and by peers."""
    columns = {
        "one pass": ("fused_ignore_ce", ("one pass",)),
        "two launches": ("fused_ignore_ce", ("forward", "backward")),
        "Liger": ("liger_kernel", ("one pass",)),
        "TRL": ("trl", ("forward", "backward")),
    }
    lines = [f"{'forward + backward, ms':23}" + "".join(f"{name:>13}" for name in columns)]
    for chip in chips.CHIPS:
        for V in VOCABULARIES:
            times = [milliseconds(rows, *column, chip.name, V) for column in columns.values()]
            if any(time is not None for time in times):
                cells = "".join(f"{'-' if time is None else f'{time:.3f}':>13}" for time in times)
                lines.append(f"{chip.name:9} V={V:<12}{cells}")
    return "\n".join(lines)
