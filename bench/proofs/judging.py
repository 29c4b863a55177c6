"""What a compiled kernel costs per logit, the budgets that it has to keep, and the faults that it has."""

from __future__ import annotations

from math import ceil, prod

import torch
import triton

from . import chips, roof
from .cases import DISTILLATION, ROW_OPERATIONS, Case
from .compiling import Proof
from .machine_code import Block

#: Bytes of the widest access that every architecture has.
WIDE = 16

#: Triton 3.9 compiles some kernels to a little more than 3.7 does.
_IS_LATER = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)

#: The most instructions per logit in a kernel's loops, by operation, features and dtype; for one pass, in both of its
#: loops together. At 92% of the memory roof, an H200 has 13.4 issue slots per logit in a bfloat16 forward pass, a B200
#: has 9.5. In a backward pass, both have twice as many. A kernel keeps about three quarters of the slots busy.
#:
#: For distillation, they are per logit of the student, in all walks together. That logit comes with one of the teacher,
#: so an H200 has 26.8 issue slots for it in forward and 40.2 in backward, a B200 19.0 and 28.5. "jsd" takes more.
BUDGETS: dict[tuple[str, tuple[str, ...], str], float] = {
    ("forward", (), "bfloat16"): 8.0,
    ("forward", ("stats",), "bfloat16"): 14.0,
    ("forward", ("smoothing",), "bfloat16"): 11.0,
    ("forward", ("softcap",), "bfloat16"): 19.0,
    ("forward", (), "float32"): 9.0,
    ("backward", (), "bfloat16"): 10.0,
    ("backward", ("smoothing",), "bfloat16"): 11.0,
    ("backward", ("softcap",), "bfloat16"): 24.0,
    ("backward", (), "float32"): 11.0,
    ("one pass", (), "bfloat16"): 17.0,
    ("on chip", (), "bfloat16"): 14.0,
    ("on chip", ("smoothing",), "bfloat16"): 18.0,
    ("on chip", ("stats",), "bfloat16"): 21.0,
    ("on chip", ("softcap",), "bfloat16"): 34.0,
    ("on chip", (), "float32"): 14.0,
    ("distillation", (), "bfloat16"): 20.0,
    ("distillation", ("reverse",), "bfloat16"): 20.0,
    ("distillation", ("jsd",), "bfloat16"): 50.0,
    ("distillation", ("hard",), "bfloat16"): 24.5,
    ("distillation", (), "float32"): 17.0,
    ("distillation gradient", (), "bfloat16"): 32.5,
    ("distillation gradient", ("reverse",), "bfloat16"): 37.0,
    ("distillation gradient", ("jsd",), "bfloat16"): 85.0 if _IS_LATER else 84.0,
    ("distillation backward", (), "bfloat16"): 11.0,
    ("distillation backward", ("reverse",), "bfloat16"): 16.0,
    ("distillation backward", ("jsd",), "bfloat16"): 33.0,
    ("distillation backward", ("hard",), "bfloat16"): 14.5,
    ("distillation backward", (), "float32"): 8.5,
    ("top-k", (), "bfloat16"): 8.0,
    ("top-k", ("hard",), "bfloat16"): 11.5,
    ("top-k", ("softcap",), "bfloat16"): 19.0,
    ("top-k", (), "float32"): 7.0,
    ("top-k backward", (), "bfloat16"): 8.0,
    ("top-k backward", ("hard",), "bfloat16"): 11.0,
    ("top-k backward", ("softcap",), "bfloat16"): 21.0,
}

#: The most barriers in all loops together, where there may be any: for the pieces that are copied to shared memory.
BARRIERS = {"on chip": 5 if _IS_LATER else 3}

#: The most bytes of code in that kernel's loop over rows: a multiprocessor's cache of instructions has 128 KB.
LOOP_BYTES = 48 << 10
ON_CHIP = "on_chip_kernel"

#: The operations that write a gradient.
WRITES = ("backward", "one pass", "on chip", "distillation gradient", "distillation backward", "top-k backward")

#: The architectures that budgets are for.
BUDGET_ARCHS = (90, 100)

#: The fewest threads of a plain kernel that have to be resident on a multiprocessor. One pass is left out, because it
#: launches only as many programs as leave its rows in the L2 cache.
RESIDENT_THREADS = {
    "forward": 1536, "backward": 1536, "distillation": 640, "distillation backward": 1024, "top-k": 1536,
    "top-k backward": 1536,
}  # fmt: skip

#: Accesses are judged from this many classes on. With fewer, a tile has fewer elements than threads, and it does not
#: matter how they are accessed.
FEWEST_CLASSES = 16

#: Budgets hold from this vocabulary on. With fewer classes, other code than the loops has a part in the time.
BUDGET_CLASSES = 32000


def loaded_a_logit(case: Case, rows: int = 1) -> float:
    """Bytes that a kernel's loops load per logit.

    Class weights are loaded in loops only where targets spread over all classes, and one serves all rows of a tile.
    """
    if case.operation in DISTILLATION:
        return 2 * case.itemsize
    probs = "probs" in case.features
    weights = "weight" in case.features and (probs or "smoothing" in case.features)
    return case.itemsize * (1 + probs + weights / rows)


def work(proof: Proof, rows: int | None = None) -> roof.Work:
    """The work of a proof's launch; with `rows`, of the same launch on that many rows."""
    case = proof.job.case
    launched = case.B * case.T
    rows = rows or launched
    pieces, size, rest = proof.held or (0, 0, True)
    return roof.Work(
        rows=rows,
        classes=case.V,
        itemsize=case.itemsize,
        programs=prod(proof.grid) * rows // launched,
        threads=proof.threads,
        rows_a_program=proof.tile[0],
        loaded_a_logit=loaded_a_logit(case, proof.tile[0]),
        writes=case.operation in WRITES,
        in_place=case.operation in ("one pass", "on chip", "distillation gradient", "top-k backward"),
        backwards=case.library == "fused_ignore_ce",
        shared=pieces * size,
        kept=size if rest else case.V - pieces * size,
        pieces=pieces,
    )


def loop_instructions(proof: Proof) -> float:
    """Instructions per logit in loops, or in all code where there is no loop.

    If a row is walked twice, the loops of both walks are added. If a walk has several loops, only the first counts: it
    handles most logits, and the others handle what it leaves. A divergence may take a walk more, with a loop like it.
    """
    assert proof.code is not None
    if not proof.code.loops:
        return roof.cost(proof.code, work(proof)).instructions
    a_logit = loaded_a_logit(proof.job.case, proof.tile[0])
    if proof.kernel == ON_CHIP:
        held = [loop for loop in (*proof.code.held, *proof.code.loops) if loop.loaded_shared]
        return sum(loop.instructions * proof.job.case.itemsize / loop.loaded_shared for loop in held)
    total = 0.0
    for stores in (False, True):
        walk = [loop for loop in proof.code.loops if bool(loop.stored) == stores]
        for first, _ in roof.trips(walk, 0, a_logit)[:1]:
            like = [loop for loop in walk if (loop.masked, loop.loaded) == (first.masked, first.loaded)]
            for loop in like if proof.job.case.operation in DISTILLATION else [first]:
                total += loop.instructions * a_logit / loop.loaded
    return total


def resident_threads(proof: Proof, chip: chips.Chip) -> int:
    assert proof.code is not None
    usage = proof.code.usage
    return chips.resident_programs(chip, usage.registers, proof.threads, usage.shared) * proof.threads


def is_row_kernel(proof: Proof) -> bool:
    """Whether it is the kernel that reads the logits, not one that its launcher launches besides."""
    case = proof.job.case
    return case.library != "fused_ignore_ce" or ROW_OPERATIONS.get(case.operation) == proof.kernel


def accesses(proof: Proof) -> set[str]:
    """The accesses to tensors of the logits' shape that a kernel cannot do without."""
    case = proof.job.case
    if not is_row_kernel(proof):
        return set()
    found = {"load logits.x"} | ({"load logits.probs"} if "probs" in case.features else set())
    if case.operation in DISTILLATION:
        found |= {"load logits.teacher"}
    if case.operation in WRITES:
        found |= {"store gradients.dx"} | ({"store gradients.dprobs"} if "probs" in case.features else set())
    return found


def bytes_due(proof: Proof) -> int:
    """How many bytes wide an access to logits has to be.

    It is 16 bytes or, where this is less, all elements of the tile that a thread has. No width is demanded where lines
    are unaligned, nor for strided classes: their neighbouring elements belong to different rows, any of which may be
    ignored, so that each element has its own mask.
    """
    case = proof.job.case
    if not (case.contiguous and case.aligned):
        return 0
    elements = max(1, prod(proof.tile) // proof.threads)
    return min(WIDE, elements * getattr(torch, case.dtype).itemsize)


def hot_loops(proof: Proof) -> list[Block]:
    """The loops over whole tiles, or all loops if every tile is masked."""
    assert proof.code is not None
    return [*proof.code.held, *([loop for loop in proof.code.loops if not loop.masked] or proof.code.loops)]


def budget_of(proof: Proof) -> float | None:
    """The budget that a kernel has to keep; None if it has none."""
    case, target = proof.job.case, proof.job.target
    due = case.contiguous and case.aligned and case.V >= BUDGET_CLASSES and target.arch in BUDGET_ARCHS
    if not due or case.library != "fused_ignore_ce" or not is_row_kernel(proof):
        return None
    return BUDGETS.get((case.operation, case.features, case.dtype))


def faults(proof: Proof) -> list[str]:
    """The faults of a kernel. Peers' kernels are counted, but not judged."""
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
    if proof.kernel == ON_CHIP and proof.code.loop_bytes > LOOP_BYTES:
        found.append(f"{proof.code.loop_bytes} bytes of code in a loop")
    if proof.shared > chips.of_arch(proof.job.target.arch).shared - chips.KB:
        found.append(f"{proof.shared} bytes of shared memory")
    for access in sorted(accesses(proof)) if case.V >= FEWEST_CLASSES else ():
        if access not in proof.widths:
            # In a strided tile, an address that passes another thread cannot be told from a gather's; no width is due.
            found += [f"no {access} found"] if case.contiguous else []
        elif proof.widths[access] < bytes_due(proof):
            found.append(f"{access} {proof.widths[access]} bytes wide, not {bytes_due(proof)}")
    strided = not case.contiguous and proof.tile[0] > 1 and case.V >= FEWEST_CLASSES
    if is_row_kernel(proof) and strided and proof.rows_together is False:
        found.append("neighbouring threads do not access neighbouring rows")
    return found + over_budget(proof)


def over_budget(proof: Proof) -> list[str]:
    case, budget = proof.job.case, budget_of(proof)
    if budget is None:
        return []
    found = []
    instructions = loop_instructions(proof)
    if instructions > budget:
        found.append(f"{instructions:.1f} instructions a logit, not {budget:g}")
    for what in ("barriers", "shuffles"):
        allowed = BARRIERS.get(case.operation, 0) if what == "barriers" else 0
        if (count := sum(getattr(loop, what) for loop in hot_loops(proof))) > allowed:
            found.append(f"{count} {what} in its loops")
    least = RESIDENT_THREADS.get(case.operation, 0) if not case.features and case.dtype == "bfloat16" else 0
    chip = chips.of_arch(proof.job.target.arch)
    # A grid of few programs does not fill a multiprocessor, however few registers they take.
    least = min(least, ceil(prod(proof.grid) / chip.multiprocessors) * proof.threads)
    if (threads := resident_threads(proof, chip)) < least:
        found.append(f"{threads} resident threads, not {least}")
    return found
