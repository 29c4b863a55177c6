"""Predicts the share of the memory roof, and the time, of this project's kernels and its peers' on every chip.

    python -m bench.proofs.predicting [--summary FILE]

Beside the predictions, it prints how far the model is off for published times of other kernels, see
`bench.proofs.calibrating`. Nothing is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from bench import machine
from bench.packages import TRL_CHUNK

from . import calibrating, chips, compiling, peers, roof
from .cases import Case
from .compiling import Job, Proof, Target
from .judging import work

#: What is printed above predictions, wherever they are printed.
NOTE = (
    "Predictions from machine code, not measurements. The same model is off by 2.4% at the median and 7.6% at most for "
    "the published times of other kernels in the table."
)

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

    def figures(self) -> dict[str, Any]:
        prediction = self.prediction
        return {
            "chip": prediction.chip,
            "V": self.V,
            "kernel": f"{self.library} {self.kernel}",
            "share of the memory roof": round(prediction.share, 3),
            "bound": prediction.limit,
            "bounds": {name: round(share, 3) for name, share in prediction.bounds.items()},
            "HBM reads of a logit": round(prediction.hbm_reads, 3),
            "resident threads": prediction.resident_threads,
            "milliseconds": round(self.milliseconds, 4),
        }


def every(chip: chips.Chip, quick: bool) -> list[Job]:
    """The kernels to predict on a chip. With `quick`, at two vocabularies, and Liger is the only peer."""
    vocabularies = VOCABULARIES[::2] if quick else VOCABULARIES
    ours = [
        Case(operation, 1, ROWS, V)
        for V in vocabularies
        for operation in ("forward", "backward", "one pass")
    ]  # fmt: skip
    theirs = [case for V in vocabularies for case in peers.every(V) if not quick or case.library == "liger_kernel"]
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


def tables(rows: Iterable[Row]) -> str:
    """Predictions, with the model's errors for published times beside them."""
    shown = [{name: value for name, value in row.figures().items() if name != "bounds"} for row in rows]
    left = ("counted in", "bytes of a logit", "shown")
    errors = [{k: v for k, v in row.items() if k not in left} for row in calibrating.table(calibrating.shown())]
    return "\n\n".join([NOTE, *(tabulate(each, "keys", maxheadercolwidths=12) for each in (shown, errors))])


def main() -> None:
    machine.compile_kernels("bench.proofs.predicting")
    parser = machine.parser("bench.proofs.predicting", __doc__, summary="predictions and the model's errors")
    options = parser.parse_args()
    header = machine.header(sys.argv[1:], "bench.proofs.predicting")
    rows = predict(compiling.compile_all([job for chip in chips.CHIPS for job in every(chip, quick=False)]))
    print(tables(rows))
    if options.summary:
        published = calibrating.table(calibrating.samples(), calibrating.left_out())
        found = {"header": header, "note": NOTE, "published": published}
        machine.write(options.summary, found | {"predictions, not measurements": [row.figures() for row in rows]})


if __name__ == "__main__":
    main()
