"""What a compiled kernel costs a logit, the budgets that it has to keep, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch

from . import chips, roof
from .cases import ROW_OPERATIONS, Case
from .compiling import Proof
from .machine_code import Block

#: Bytes of the widest access that every architecture has.
WIDE = 16


@dataclass(frozen=True)
class Budget:
    """The most instructions a logit in the loops of a kernel, those of one pass in both of its loops together."""

    operation: str
    features: tuple[str, ...]
    dtype: str
    instructions: float


#: At 92% of the memory roof an H200 has 13.4 issue slots a logit of a bfloat16 forward pass, and twice as many of a
#: backward pass; a B200 has 9.5. A kernel keeps about three quarters of them busy.
BUDGETS = (
    Budget("forward", (), "bfloat16", 8.0),
    Budget("forward", ("stats",), "bfloat16", 14.0),
    Budget("forward", ("smoothing",), "bfloat16", 11.0),
    Budget("forward", ("softcap",), "bfloat16", 19.0),
    Budget("forward", (), "float32", 9.0),
    Budget("backward", (), "bfloat16", 10.0),
    Budget("backward", ("smoothing",), "bfloat16", 11.0),
    Budget("backward", ("softcap",), "bfloat16", 24.0),
    Budget("backward", (), "float32", 11.0),
    Budget("one pass", (), "bfloat16", 17.0),
)

#: The architectures that budgets are for.
BUDGET_ARCHS = (90, 100)

#: The least resident threads on a multiprocessor of the plain kernels. One pass is left out: it has as many programs
#: as leave its rows in the L2 cache.
RESIDENT_THREADS = {"forward": 1536, "backward": 1536}

#: With fewer classes, a tile has fewer elements than threads, and how they are accessed makes no difference.
FEWEST_CLASSES = 16

#: The least vocabulary for which a program's loops are long enough to be what counts.
BUDGET_CLASSES = 32000


def loaded_a_logit(case: Case, rows: int = 1) -> float:
    """Bytes that a kernel's loops load for a logit.

    Only the weights of targets over all classes are loaded in loops; one serves all rows of a tile.
    """
    probs = "probs" in case.features
    weights = "weight" in case.features and (probs or "smoothing" in case.features)
    return case.itemsize * (1 + probs + weights / rows)


def work(proof: Proof, rows: int | None = None) -> roof.Work:
    """What the launch of a proof worked on; with `rows`, the same for more rows."""
    case = proof.job.case
    launched = case.B * case.T
    rows = rows or launched
    return roof.Work(
        rows=rows,
        classes=case.V,
        itemsize=case.itemsize,
        programs=prod(proof.grid) * rows // launched,
        threads=proof.threads,
        rows_a_program=proof.tile[0],
        loaded_a_logit=loaded_a_logit(case, proof.tile[0]),
        writes=case.operation in ("backward", "one pass"),
        in_place=case.operation == "one pass",
        backwards=case.library == "fused_ignore_ce",
    )


def loop_instructions(proof: Proof) -> float:
    """Instructions a logit in loops: one of them, or two that walk a row twice; of everything where there is no loop.

    Of loops over the same logits, the first counts: it handles most of them, and others what it leaves.
    """
    assert proof.code is not None
    if not proof.code.loops:
        return roof.cost(proof.code, work(proof)).instructions
    a_logit = loaded_a_logit(proof.job.case, proof.tile[0])
    total = 0.0
    for stores in (False, True):
        walk = [loop for loop in proof.code.loops if bool(loop.stored) == stores]
        for loop, _ in roof.trips(walk, 0, a_logit)[:1]:
            total += loop.instructions * a_logit / loop.loaded
    return total


def resident_threads(proof: Proof, chip: chips.Chip) -> int:
    assert proof.code is not None
    usage = proof.code.usage
    return chips.resident_programs(chip, usage.registers, proof.threads, usage.shared) * proof.threads


def is_row_kernel(proof: Proof) -> bool:
    """Whether it is the kernel that reads the logits, and not one that a launcher adds."""
    case = proof.job.case
    return case.library != "fused_ignore_ce" or ROW_OPERATIONS.get(case.operation) == proof.kernel


def accesses(proof: Proof) -> set[str]:
    """The accesses to tensors of the logits' shape that a kernel has to have."""
    case = proof.job.case
    if not is_row_kernel(proof):
        return set()
    found = {"load x_ptr"} | ({"load probs_ptr"} if "probs" in case.features else set())
    if case.operation in ("backward", "one pass"):
        found |= {"store dx_ptr"} | ({"store dprobs_ptr"} if "probs" in case.features else set())
    return found


def bytes_due(proof: Proof) -> int:
    """How wide an access to logits has to be.

    16 bytes, or all that a thread has of the tile: a tile of few rows of a small vocabulary has fewer elements than
    threads. Nothing is asked where lines are unaligned, nor of strided classes: there, neighbouring elements belong
    to different rows, any of which may be ignored, so that each has its own mask.
    """
    case = proof.job.case
    if not (case.contiguous and case.aligned):
        return 0
    elements = max(1, prod(proof.tile) // proof.threads)
    return min(WIDE, elements * getattr(torch, case.dtype).itemsize)


def hot_loops(proof: Proof) -> list[Block]:
    """The loops over whole tiles; all loops where tiles are masked throughout."""
    assert proof.code is not None
    return [loop for loop in proof.code.loops if not loop.masked] or list(proof.code.loops)


def budget_of(proof: Proof) -> Budget | None:
    """The budget that a kernel has to keep."""
    case, target = proof.job.case, proof.job.target
    due = case.contiguous and case.aligned and case.V >= BUDGET_CLASSES and target.arch in BUDGET_ARCHS
    if not due or case.library != "fused_ignore_ce" or not is_row_kernel(proof):
        return None
    wanted = case.operation, case.features, case.dtype
    return next((b for b in BUDGETS if (b.operation, b.features, b.dtype) == wanted), None)


def faults(proof: Proof) -> list[str]:
    """What is wrong with a kernel; empty when all is well. Peers' kernels are counted and not judged."""
    case = proof.job.case
    if proof.error:
        return [proof.error]
    if case.library != "fused_ignore_ce":
        return []
    if proof.code is None:
        # Scalar registers that spill go to lanes of vector registers, and to memory only if these spill as well.
        in_memory = ("vgpr_spill_count", "private_segment_fixed_size")
        return [f"{name} {proof.amd[name]}" for name in in_memory if proof.amd[name]]
    found = [f"spills {proof.code.spills}"] if proof.code.spills else []
    for access in sorted(accesses(proof)) if case.V >= FEWEST_CLASSES else ():
        if access not in proof.widths:
            found.append(f"no {access} found")
        elif proof.widths[access] < bytes_due(proof):
            found.append(f"{access} {proof.widths[access]} bytes wide, not {bytes_due(proof)}")
    strided = not case.contiguous and proof.tile[0] > 1 and case.V >= FEWEST_CLASSES
    if is_row_kernel(proof) and strided and proof.rows_together is False:
        found.append("neighbouring threads do not access neighbouring rows")
    return found + over_budget(proof)


def over_budget(proof: Proof) -> list[str]:
    budget = budget_of(proof)
    if budget is None:
        return []
    found = []
    instructions = loop_instructions(proof)
    if instructions > budget.instructions:
        found.append(f"{instructions:.1f} instructions a logit, not {budget.instructions:g}")
    for what in ("barriers", "shuffles"):
        if count := sum(getattr(loop, what) for loop in hot_loops(proof)):
            found.append(f"{count} {what} in its loops")
    least = RESIDENT_THREADS.get(budget.operation, 0) if not budget.features and budget.dtype == "bfloat16" else 0
    chip = next(chip for chip in chips.CHIPS if chip.arch == proof.job.target.arch)
    # A grid of few programs does not fill a multiprocessor, however few registers they take.
    least = min(least, ceil(prod(proof.grid) / chip.multiprocessors) * proof.threads)
    if (threads := resident_threads(proof, chip)) < least:
        found.append(f"{threads} resident threads, not {least}")
    return found
