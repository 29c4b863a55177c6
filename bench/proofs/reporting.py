"""Proofs and predictions as rows: of the tables that are printed, and of the files that are written."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tabulate import tabulate

from . import cases, chips, judging, predicting, roof
from .compiling import Proof
from .predicting import Row

#: What the table of kernels shows. A file has all figures of all kernels.
SHOWN = (
    "kernel", "shape", "target", "dtype", "tile", "warps", "registers", "shared", "spills", "resident threads",
    "instructions a logit in loops", "instructions a logit", "special functions a logit", "bytes in flight a thread",
    "vgpr_count", "vgpr_spill_count",
)  # fmt: skip


def kernel(proof: Proof) -> dict[str, Any]:
    """A kernel's figures, for the launch that it was compiled for, and its faults."""
    case = proof.job.case
    other = "" if judging.is_row_kernel(proof) else f": {proof.kernel}"
    found = {
        "kernel": f"{case.name}{'' if case.contiguous else ' strided'}{other}",
        "shape": f"{case.B}x{case.T}x{case.V}",
        "target": str(proof.job.target),
        "dtype": case.dtype,
        "tile": "x".join(map(str, proof.tile)),
        "warps": proof.num_warps,
        "grid": proof.grid,
        "widths": proof.widths,
        "faults": judging.faults(proof),
    }
    return found | (counted(proof) if proof.code else proof.amd)


def counted(proof: Proof) -> dict[str, Any]:
    """What was counted in NVIDIA's machine code."""
    code = proof.code
    assert code is not None
    found: dict[str, Any] = {
        "registers": code.usage.registers,
        "shared": code.usage.shared,
        "spills": code.spills,
        "barriers in loops": sum(loop.barriers for loop in judging.hot_loops(proof)),
        "shuffles in loops": sum(loop.shuffles for loop in judging.hot_loops(proof)),
        "bytes in flight a thread": max((loop.in_flight for loop in code.loops), default=code.outside.in_flight),
        "instructions outside of loops": code.outside.instructions,
        "resident threads": judging.resident_threads(proof, chips.of_arch(proof.job.target.arch)),
    }
    if judging.is_row_kernel(proof):
        cost = roof.cost(code, judging.work(proof))
        found |= {
            "instructions a logit in loops": round(judging.loop_instructions(proof), 2),
            "instructions a logit": round(cost.instructions, 2),
            "special functions a logit": round(cost.special, 2),
        }
    return found


def tables(proofs: list[Proof], rows: list[Row]) -> str:
    """The kernels at models' shapes, the number of all kernels by target and operation, and the predictions."""
    models = [kernel(proof) for proof in proofs if (proof.job.case.T, proof.job.case.V) in cases.MODEL_ROWS]
    shown = [{name: figures.get(name) for name in SHOWN} for figures in models]
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for proof in proofs:
        groups[str(proof.job.target), proof.job.case.operation].append(bool(judging.faults(proof)))
    counts = [(*of, len(faulty), sum(faulty)) for of, faulty in sorted(groups.items())]
    return "\n\n".join([
        tabulate(shown, "keys", maxheadercolwidths=12),
        tabulate(counts, ("target", "operation", "kernels", "with faults")),
        predicting.tables(rows),
    ])  # fmt: skip


def totals(proofs: list[Proof], rows: list[Row], failed: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """What result files keep of a run."""
    found = [judging.faults(proof) for proof in proofs]
    return about | {
        "kernels": len(proofs),
        "targets": list(dict.fromkeys(str(proof.job.target) for proof in proofs)),
        "dtypes": list(dict.fromkeys(proof.job.case.dtype for proof in proofs)),
        "spilling": sum(any("spill" in fault for fault in faults) for faults in found),
        "narrow": sum(any("wide" in fault for fault in faults) for faults in found),
        "faults": failed,
        "predictions, not measurements": [row.figures() for row in rows],
    }
