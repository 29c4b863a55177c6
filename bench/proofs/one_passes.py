"""Compares the one pass that keeps its row on the chip with the one before it, which reads it again from the cache.

    python -m bench.proofs.one_passes [--minutes 60] [--out DIR]

Both are compiled and counted; a few rows are executed by the emulator, which counts what they read and write; and
their times are predicted, see `bench.proofs.predicting`. Nothing is measured on a GPU. Beside the predictions stand the
times that others published for their kernels of the same sizes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from bench import machine

from . import chips, compiling, judging, predicting, published, roof
from .cases import Arguments, Case, fullest
from .compiling import Job, Proof, Target
from .emulator.launching import Emulator

#: The operations of `cases`, and what tables call them.
BEFORE, AFTER = "one pass", "on chip"

CHIPS = ("A100", "H100", "H200", "B200", "L40S")

N = 8192
V = 128256

#: All options at a model's vocabulary, and no option at others and in float32.
CASES = [
    *(Case(AFTER, 1, N, V, features=each) for each in ((), ("smoothing",), ("stats",), ("softcap",), *fullest(AFTER))),
    Case(AFTER, 1, N, V, "float32"),
    *(Case(AFTER, 1, rows, classes) for rows, classes in ((N, 32000), (32768, 65536), (N, 151936), (N, 256000))),
]

#: The kernels that have published times of the same work. QuACK has two launches for it.
PUBLISHED = {
    published.AFTER: "Liger", published.LIGER_CUTE: "Liger's CuTe", published.QUACK: "QuACK",
    published.QUACK_BACKWARD: "QuACK",
}  # fmt: skip

#: Rows that are executed.
ROWS = 2


class Executed(NamedTuple):
    """What executed code made of device memory and of its instructions, per logit."""

    reads: float
    writes: float
    instructions: float  # of PTX


@dataclass(frozen=True)
class Row:
    """One kernel with one set of options on one chip."""

    chip: str
    arch: str
    options: str
    dtype: str
    N: int
    V: int
    kernel: str
    instructions_a_logit: float  # of machine code, in the loops; too few where the assembler unrolled one completely
    registers: int
    threads: int  # on a multiprocessor
    reads: float
    writes: float
    ptx_instructions_a_logit: float
    predicted_hbm_reads: float
    predicted_milliseconds: float
    bound: str


def jobs() -> list[Job]:
    """Every kernel once: two chips that have the same architecture and shared memory share it. The first come first."""
    archs = {chips.chip(name).arch: name for name in reversed(CHIPS)}
    return [
        Job(replace(case, operation=operation), Target("cuda", arch, name))
        for case in CASES
        for arch, name in sorted(archs.items())
        for operation in (BEFORE, AFTER)
    ]


def examined(job: Job) -> tuple[Proof, Executed]:
    """A compiled kernel, and what it did when it was executed."""
    proof = compiling.compiled(job)
    if proof.code is None:
        raise RuntimeError(f"{job.case}, {job.target}: {proof.error}")
    arguments = Arguments(replace(job.case, T=ROWS), "cpu")
    torch.manual_seed(0)
    for tensor in (arguments.values, arguments.scalar, arguments.weight):
        if tensor is not None:
            tensor.fill_(1.0)
    x = arguments.x.normal_()
    arguments.target.random_(job.case.V)
    assert isinstance(job.target.arch, int)
    with Emulator(job.target.arch, assembled=True) as emulator:
        compiling.call(job.case, job.target, arguments)
    [(name, [kernel])] = emulator.kernels.items()
    assert name == proof.kernel, f"{name} was executed, and {proof.kernel} compiled"
    read, written = kernel.moved[x.data_ptr()] / x.nbytes
    return proof, Executed(float(read), float(written), 32 * kernel.counts().warps.total() / x.numel())


def rows(found: list[tuple[Proof, Executed]]) -> Iterator[Row]:
    """A row for each chip of a kernel's architecture."""
    for proof, executed in found:
        case, code = proof.job.case, proof.code
        assert code is not None
        todo = judging.work(proof, case.T)
        for chip in (chip for chip in map(chips.chip, CHIPS) if chip.arch == proof.job.target.arch):
            prediction = roof.predict(code, todo, chip)
            yield Row(
                chip.name, f"sm_{chip.arch}", "+".join(case.features) or "plain", case.dtype, case.T, case.V,
                case.operation, round(judging.loop_instructions(proof), 1), code.usage.registers,
                prediction.resident_threads, round(executed.reads, 3), round(executed.writes, 3),
                round(executed.instructions, 1), round(prediction.hbm_reads, 3),
                round(1e3 * case.T * case.V * prediction.seconds_a_logit, 3), prediction.limit,
            )  # fmt: skip


def others() -> list[dict[str, Any]]:
    """The published times of the same work; of several for one kernel, the last that was published."""
    found: dict[tuple[str, int, int, int, str], dict[published.Kernel, published.Row]] = {}
    for row in published.rows():
        if row.kernel in PUBLISHED:
            key = row.chip.name, row.N, row.V, row.itemsize, PUBLISHED[row.kernel]
            found.setdefault(key, {})[row.kernel] = row
    return [
        {
            "chip": chip, "N": tokens, "V": classes, "dtype": "bfloat16" if itemsize == 2 else "float32",
            "kernel": name,
            "milliseconds": round(sum(row.milliseconds for row in kernels.values()), 3), "launches": len(kernels),
            "source": next(iter(kernels.values())).source,
        }
        for (chip, tokens, classes, itemsize, name), kernels in found.items()
        if any((case.T, case.V, case.itemsize) == (tokens, classes, itemsize) for case in CASES)
    ]  # fmt: skip


def main() -> None:
    machine.compile_kernels("bench.proofs.one_passes")
    parser = machine.parser("bench.proofs.one_passes", __doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="leave out what is not ready by then (60)")
    options = parser.parse_args()
    header = machine.header(sys.argv[1:], "bench.proofs.one_passes")
    todo, deadline = jobs(), time.monotonic() + 60 * options.minutes
    every = iter(tqdm(compiling.of_all(examined, todo), total=len(todo), unit="kernel"))
    found: list[tuple[Proof, Executed]] = []
    while len(found) < len(todo) and time.monotonic() < deadline:
        found += [next(every), next(every)]  # what was, and what is
    left_out = [f"{job.case}, {job.target}" for job in todo[len(found) :]]
    result = [asdict(row) for row in rows(found)]
    print(predicting.NOTE, tabulate(result, "keys", maxheadercolwidths=12), tabulate(others(), "keys"), sep="\n\n")
    path = options.out / f"one_passes-{header['date']}.json"
    more = {"published": others(), "left out": left_out}
    machine.write(path, {"header": header, "note": predicting.NOTE, "rows": result} | more)


if __name__ == "__main__":
    main()
