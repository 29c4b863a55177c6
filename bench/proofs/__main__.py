"""Compiles every kernel in every configuration that a launcher can choose, and counts its instructions, without a GPU.

    python -m bench.proofs [--quick] [--arch 90] [--dtype bfloat16] [--json FILE] [--summary FILE] [--keep DIR]

For AMD's targets, only the kernels of models' shapes are compiled. The exit status is 1 if a kernel does not compile,
spills, uses narrower accesses to logits than it could or is over its budget, or if one pass is predicted to read the
logits of a small vocabulary from device memory more than once. Predictions follow from machine code and data sheets;
nothing was measured.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from bench import machine

from . import cases, chips, compiling, judging, predicting, reporting
from .compiling import CUDA_TARGETS, HIP_TARGETS, Job, Proof, Target

TARGETS = {str(target.arch): target for target in (*CUDA_TARGETS, *HIP_TARGETS)}

#: What a quick run compiles.
QUICK_TARGETS = ("90", "gfx942")
QUICK_DTYPES = ("bfloat16",)
QUICK_CHIPS = ("H200",)
QUICK_CLASSES = 32000  # for AMD's targets

#: Short rows and rows with a tail, whose kernels have few registers to spare: a quick run compiles them, too.
TIGHT = (
    ("one pass", 8184, ("smoothing",)),
    ("on chip", 4096, ("smoothing",)),
    ("on chip", 65528, ("stats",)),
    ("on chip", 1016, ("softcap", "stats")),
    *(("on chip", V, cases.fullest("on chip")[0]) for V in (1024, 2048, 65528)),
)


def jobs(target: Target, quick: bool, dtypes: tuple[str, ...] = cases.DTYPES) -> list[Job]:
    """The kernels to compile for a target.

    AMD's machine code is only read for spills, so for AMD's targets these are the kernels of models' shapes, and in a
    quick run those with the fullest features, which spill first.
    """
    if target.backend == "hip":
        every = list(cases.every(QUICK_DTYPES if quick else dtypes, quick=True))
        if quick:
            every = [c for c in every if c.V == QUICK_CLASSES and c.features in cases.fullest(c.operation)]
        return compiling.jobs(every, target)
    if not quick:
        return compiling.jobs(cases.every(dtypes, quick=False), target)
    case = cases.Case("", *cases.MODELS[0])
    budgeted = [replace(case, operation=o, features=f, dtype=dtype) for o, f, dtype in judging.BUDGETS]
    tight = [replace(case, operation="one pass", features=(feature,)) for feature in ("smoothing", "softcap")]
    tight += [replace(case, operation=o, features=f, V=V) for o, V, f in TIGHT]
    every = [c for c in cases.every(QUICK_DTYPES, quick=True) if c.contiguous or c.operation != "part"]
    return compiling.jobs([*budgeted, *tight, *every], target)


def run(todo: list[Job]) -> list[Proof]:
    return list(tqdm(compiling.compile_all(todo), total=len(todo), unit="kernel", disable=None))


def main() -> int:
    machine.compile_kernels("bench.proofs")
    parser = machine.parser("bench.proofs", __doc__, json="all figures", summary="counts, faults and predictions")
    parser.add_argument("--quick", action="store_true", help="two architectures, bfloat16, shapes of models")
    parser.add_argument("--arch", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--dtype", action="append", choices=cases.DTYPES, help="not in a quick run; may be repeated")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the compiled kernels into this folder")
    options = parser.parse_args()

    start = time.perf_counter()
    about = {"header": machine.header(sys.argv[1:], "bench.proofs"), "quick": options.quick, "note": predicting.NOTE}
    targets = [TARGETS[arch] for arch in options.arch or (QUICK_TARGETS if options.quick else TARGETS)]
    todo = [job for target in targets for job in jobs(target, options.quick, tuple(options.dtype or cases.DTYPES))]
    wanted = [chip for chip in chips.CHIPS if chip.name in QUICK_CHIPS or not options.quick]
    wanted = [chip for chip in wanted if str(chip.arch) in options.arch] if options.arch else wanted
    found = run([*todo, *(job for chip in wanted for job in predicting.every(chip, options.quick))])
    proofs, rows = found[: len(todo)], predicting.predict(found[len(todo) :])

    print(reporting.tables(proofs, rows))
    failed = [f"{p.job.case} {p.job.target}: {'; '.join(faults)}" for p in found if (faults := judging.faults(p))]
    failed += predicting.faults(rows)
    print("", *(f"FAULT {fault}" for fault in failed), sep="\n")
    print(f"{len(proofs)} kernels in {time.perf_counter() - start:.0f} s, {len(failed)} faults")

    totals = reporting.totals(proofs, rows, failed, about)
    if options.summary:
        machine.write(options.summary, totals)
    if options.json:
        machine.write(options.json, totals | {"kernels": [reporting.kernel(proof) for proof in proofs]})
    if options.keep:
        compiling.keep(proofs, options.keep)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
