"""Compiles every kernel in every configuration that a launcher can choose, and counts its instructions, without a GPU.

    python -m bench.proofs [--quick] [--arch 90] [--dtype bfloat16] [--json FILE] [--summary FILE] [--keep DIR]

For AMD's targets, only the kernels of models' shapes are compiled. The exit status is 1 if a kernel does not compile,
spills, uses narrower accesses to logits than it could or is over its budget, or if one pass is predicted to read the
logits of a small vocabulary from device memory more than once. Predictions follow from machine code and data sheets;
nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bench import machine

from . import cases, chips, compiling, judging, peers, predicting, reporting
from .compiling import CUDA_TARGETS, HIP_TARGETS, Job, Proof, Target
from .null_driver import header

#: What a quick run compiles.
QUICK_DTYPES = ("bfloat16",)
QUICK_CHIPS = ("H200",)
QUICK_CLASSES = 32000  # for AMD's targets


def targets(archs: list[str], quick: bool) -> list[Target]:
    """The targets that `archs` names. If it is empty, all targets or, in a quick run, one of each vendor."""
    known = {str(target.arch): target for target in (*CUDA_TARGETS, *HIP_TARGETS)}
    wanted = archs or (["90", "gfx942"] if quick else list(known))
    unknown = [arch for arch in wanted if arch not in known]
    if unknown:
        raise SystemExit(f"--arch {unknown[0]}: expected one of {', '.join(known)}.")
    return [known[arch] for arch in wanted]


def jobs(target: Target, quick: bool, dtypes: tuple[str, ...] = cases.DTYPES) -> list[Job]:
    """The kernels to compile for a target.

    AMD's machine code is only read for spills, so for AMD's targets these are the kernels of models' shapes.
    """
    if target.backend == "hip":
        every = cases.every(QUICK_DTYPES if quick else dtypes, quick=True)
        return compiling.jobs([case for case in every if not quick or case.V == QUICK_CLASSES], target)
    if quick:
        budgeted = [
            replace(case, operation=budget.operation, features=budget.features, dtype=budget.dtype)
            for case in [cases.Case("", *cases.MODELS[0])]
            for budget in judging.BUDGETS
        ]  # fmt: skip
        tight = [replace(budgeted[0], operation="one pass", features=(f,)) for f in ("smoothing", "softcap")]
        return compiling.jobs([*budgeted, *tight, *cases.every(QUICK_DTYPES, quick=True)], target)
    return compiling.jobs([*cases.every(dtypes, quick=False), *peers.every(128256)], target)


def run(todo: list[Job]) -> list[Proof]:
    """Compiles the kernels, and shows progress on a terminal."""
    found = []
    for proof in compiling.compile_all(todo):
        found.append(proof)
        if sys.stderr.isatty():
            print(f"\r{len(found)} of {len(todo)}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return found


def interesting(proofs: Iterable[Proof]) -> list[Proof]:
    """The proofs that are printed by default: peers' kernels, and ours at a model's shape."""
    models = {(T, V) for _, T, V in cases.MODELS}
    return [p for p in proofs if p.job.case.library != "fused_ignore_ce" or (p.job.case.T, p.job.case.V) in models]


def main() -> int:
    if "TRITON_INTERPRET" in os.environ:  # it would replace the very functions that are to be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.proofs", *sys.argv[1:]], environment)
    parser = argparse.ArgumentParser(prog="python -m bench.proofs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two architectures, bfloat16, shapes of models")
    parser.add_argument("--arch", action="append", default=[], help="80, 90, 100, gfx942 or gfx950; may be repeated")
    parser.add_argument("--dtype", action="append", choices=cases.DTYPES, help="not in a quick run; may be repeated")
    parser.add_argument("--verbose", action="store_true", help="a line for every kernel")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--summary", type=Path, help="write counts, faults and predictions to this file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the compiled kernels into this folder")
    options = parser.parse_args()

    start = time.perf_counter()
    about = {"header": machine.header(sys.argv[1:], "bench.proofs"), "quick": options.quick, "note": predicting.NOTE}
    on, dtypes = targets(options.arch, options.quick), tuple(options.dtype or cases.DTYPES)
    todo = [job for target in on for job in jobs(target, options.quick, dtypes)]
    wanted = QUICK_CHIPS if options.quick else [chip.name for chip in chips.CHIPS]
    archs = {target.arch for target in on}
    predicted_on = [chip for chip in chips.CHIPS if chip.name in wanted and (chip.arch in archs or not options.arch)]
    found = run([*todo, *(job for chip in predicted_on for job in predicting.every(chip, options.quick))])
    proofs, predicted = found[: len(todo)], found[len(todo) :]
    rows = predicting.predict(predicted)

    print(header())
    print("\n".join([reporting.HEADER, *map(reporting.line, proofs if options.verbose else interesting(proofs))]))
    print(f"\n{reporting.summary(proofs)}")
    print(f"\n{predicting.NOTE}\n{predicting.table(rows)}\n\n{predicting.comparison(rows)}")
    wrong = [proof for proof in (*proofs, *predicted) if judging.faults(proof)]
    failed = [f"{proof.job.case} {proof.job.target}: {'; '.join(judging.faults(proof))}" for proof in wrong]
    failed += predicting.faults(rows)
    print("\n".join(f"FAULT {fault}" for fault in failed), end="\n" if failed else "")
    print(f"{len(proofs)} kernels in {time.perf_counter() - start:.0f} s, {len(wrong)} with faults")

    if options.summary:
        options.summary.write_text(json.dumps(reporting.totals(proofs, rows, failed, about), indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(reporting.data(proofs, rows, about), indent=1) + "\n")
    if options.keep:
        compiling.keep(proofs, options.keep)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
