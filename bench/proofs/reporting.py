"""Formats proofs as lines of a table, and as data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from . import chips, judging, roof
from .compiling import Proof
from .predicting import Row

HEADER = (
    f"{'kernel':56} {'shape':>14} {'arch':7} {'dtype':8} {'tile':>13} {'warps':>5}"
    f" {'regs':>4} {'shared':>6} {'spilt':>5} {'threads':>7}"
    f" {'loop':>5} {'all':>6} {'special':>7} {'barriers':>8} {'shuffles':>8} {'in flight':>9}"
)


def figures(proof: Proof) -> dict[str, Any]:
    """The figures of a kernel, for the launch that it was compiled for."""
    if proof.code is None:
        return dict(proof.amd)
    code = proof.code
    chip = next((chip for chip in chips.CHIPS if chip.arch == proof.job.target.arch), None)
    found: dict[str, Any] = {
        "registers": code.usage.registers,
        "shared": code.usage.shared,
        "spills": code.spills,
        "barriers in loops": sum(loop.barriers for loop in judging.hot_loops(proof)),
        "shuffles in loops": sum(loop.shuffles for loop in judging.hot_loops(proof)),
        "bytes in flight a thread": max((loop.in_flight for loop in code.loops), default=code.outside.in_flight),
        "instructions outside of loops": code.outside.instructions,
    }
    if chip:
        found["resident threads"] = judging.resident_threads(proof, chip)
    if judging.is_row_kernel(proof):
        cost = roof.cost(code, judging.work(proof))
        found |= {
            "instructions a logit in loops": round(judging.loop_instructions(proof), 2),
            "instructions a logit": round(cost.instructions, 2),
            "special-function operations a logit": round(cost.special, 2),
        }
    return found


def line(proof: Proof) -> str:
    """A row under `HEADER`."""
    case = proof.job.case
    name = case.name if case.library == "fused_ignore_ce" else f"{case.library} {case.name}"
    if proof.kernel and not judging.is_row_kernel(proof):
        name = f"{name}: {proof.kernel}"
    shape = f"{case.B * case.T}x{case.V}"
    tile = "x".join(map(str, proof.tile))
    start = f"{name:56} {shape:>14} {proof.job.target!s:7} {case.dtype:8} {tile:>13} {proof.num_warps:5}"
    if proof.error:
        return f"{start} {proof.error}"
    f = figures(proof)
    if proof.code is None:
        registers, spills = f["vgpr_count"], f["vgpr_spill_count"] + f["sgpr_spill_count"]
        return f"{start} {registers:4} {'':6} {spills:5}"
    logit = [f.get(n, "") for n in ("instructions a logit in loops", "instructions a logit")]
    special = f.get("special-function operations a logit", "")
    return (
        f"{start} {f['registers']:4} {f['shared']:6} {f['spills']:5} {f.get('resident threads', ''):7}"
        f" {logit[0]:>5} {logit[1]:>6} {special:>7}"
        f" {f['barriers in loops']:8} {f['shuffles in loops']:8} {f['bytes in flight a thread']:9}"
    )


def summary(proofs: list[Proof]) -> str:
    """For each architecture and operation: how many kernels there are, spill and are faulty; most registers."""
    groups: dict[tuple[str, str], list[Proof]] = {}
    for proof in proofs:
        groups.setdefault((str(proof.job.target), proof.job.case.operation), []).append(proof)
    lines = [f"{'arch':8} {'operation':10} {'kernels':>7} {'most registers':>14} {'spilling':>8} {'faults':>6}"]
    for (target, operation), group in sorted(groups.items()):
        registers = [f.get("registers", f.get("vgpr_count", 0)) for f in map(figures, group)]
        spilling = sum(any("spill" in fault for fault in judging.faults(proof)) for proof in group)
        wrong = sum(bool(judging.faults(proof)) for proof in group)
        lines.append(f"{target:8} {operation:10} {len(group):7} {max(registers, default=0):14} {spilling:8} {wrong:6}")
    return "\n".join(lines)


def predicted(row: Row) -> dict[str, Any]:
    return {
        "chip": row.prediction.chip,
        "V": row.V,
        "kernel": f"{row.library} {row.kernel}",
        "share of the memory roof": round(row.prediction.share, 3),
        "bound": row.prediction.limit,
        "bounds": {name: round(share, 3) for name, share in row.prediction.bounds.items()},
        "HBM reads of a logit": round(row.prediction.hbm_reads, 3),
        "resident threads": row.prediction.resident_threads,
        "milliseconds": round(row.milliseconds, 4),
    }


def totals(proofs: list[Proof], rows: list[Row], failed: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """What result files keep of a run. Peers' kernels are not judged, so they are left out."""
    ours = [proof for proof in proofs if proof.job.case.library == "fused_ignore_ce"]
    found = [judging.faults(proof) for proof in ours]
    return about | {
        "kernels": len(ours),
        "targets": list(dict.fromkeys(str(proof.job.target) for proof in ours)),
        "dtypes": list(dict.fromkeys(proof.job.case.dtype for proof in ours)),
        "spilling": sum(any("spill" in fault for fault in faults) for faults in found),
        "narrow": sum(any("wide" in fault for fault in faults) for faults in found),
        "faults": failed,
        "predictions, not measurements": [predicted(row) for row in rows],
    }


def data(proofs: list[Proof], rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was found, for a JSON file."""
    return about | {
        "kernels": [
            {
                "case": str(proof.job.case),
                "kernel": proof.kernel,
                "target": str(proof.job.target),
                "tile": proof.tile,
                "num_warps": proof.num_warps,
                "grid": proof.grid,
                "widths": proof.widths,
                "faults": judging.faults(proof),
                **figures(proof),
            }
            for proof in proofs
        ],
        "predictions, not measurements": [predicted(row) for row in rows],
        "faults": dict(Counter(fault for proof in proofs for fault in judging.faults(proof))),
    }
