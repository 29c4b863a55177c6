"""Predicts the share of the memory roof, and the time, of this project's kernels and its peers' on every chip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.packages import TRL_CHUNK

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
    theirs = [case for V in VOCABULARIES for case in peers.every(V) if not quick or case.library == "liger_kernel"]
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
