"""Predicts the share of the memory roof that a kernel can reach, from its machine code and the data of a chip.

The prediction is the least of five bounds: the bytes that have to be moved, issue slots, special-function units, bytes
in flight (Little's law), and the reads that miss the L2 cache. It is no measurement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor

import numpy

from . import lru
from .chips import Chip, resident_programs
from .machine_code import Block, MachineCode

#: The share of issue slots that real kernels use.
ISSUE_SHARE = 0.75

#: Seconds from a load to its data, when memory is busy.
LATENCY = 800e-9


@dataclass(frozen=True)
class Work:
    """What a launch works on: `rows` rows of `classes` logits, by `programs` programs of `threads` threads."""

    rows: int
    classes: int
    itemsize: int
    programs: int
    threads: int
    rows_a_program: int = 1  # at a time
    loaded_a_logit: float = 0  # bytes that loops load per logit; 0 means the logit itself
    writes: bool = False  # whether the kernel writes a gradient
    in_place: bool = False  # whether the gradient overwrites the logits
    backwards: bool = True  # whether a second walk over a row starts at its end

    @property
    def logits_a_program(self) -> float:
        """The logits that a program handles between two executions of the code outside of the loops."""
        return min(self.rows * self.classes / self.programs, self.classes * self.rows_a_program)

    @property
    def bytes_a_logit(self) -> int:
        """The fewest bytes per logit that a launch has to move."""
        return self.itemsize * (2 if self.writes else 1)


@dataclass(frozen=True)
class Cost:
    """What a thread executes per logit."""

    instructions: float
    special: float
    loaded: float  # bytes
    rounds: float  # how often a thread waits for memory, per logit

    @property
    def in_flight(self) -> float:
        """Bytes that a thread has asked for when it waits, on average."""
        return self.loaded / self.rounds if self.rounds else 0.0


@dataclass(frozen=True)
class Prediction:
    chip: str
    resident_threads: int
    resident_rows: int
    hbm_reads: float  # how often each logit is read from device memory
    bounds: dict[str, float]  # shares of the roof
    seconds_a_logit: float

    @property
    def limit(self) -> str:
        return min(self.bounds, key=self.bounds.__getitem__)

    @property
    def share(self) -> float:
        return self.bounds[self.limit]


def trips(loops: Iterable[Block], logits: float, loaded_a_logit: float) -> list[tuple[Block, int]]:
    """How many iterations each loop over the same logits takes: an unrolled loop first, then the loops for the rest.

    A loop whose loads have no mask handles whole tiles only; the rest is handled under a mask, in a loop or outside.
    """
    runs = []
    order = sorted(loops, key=lambda loop: (loop.masked, -loop.loaded))
    for loop in order:
        tile = loop.loaded / loaded_a_logit
        # An integer division up to rounding: a tile is fractional where many threads share a row's classes.
        n = (ceil if loop.masked else floor)(max(logits, 0.0) / tile + (-1e-9 if loop.masked else 1e-9))
        runs.append((loop, n))
        logits -= n * tile
    return runs


def cost(code: MachineCode, work: Work) -> Cost:
    """The cost per logit, from the loops and from the code that is executed once."""
    logits = work.logits_a_program / work.threads
    loaded_a_logit = work.loaded_a_logit or work.itemsize
    total, rounds = executed(code.outside), float(code.rounds)
    # In one pass, loops that store belong to the second walk over the row, loops that only load to the first.
    for stores in (False, True):
        walk = trips((b for b in code.loops if bool(b.stored) == stores), logits, loaded_a_logit)
        for loop, n in walk:
            total += n * executed(loop)
            rounds += max(0.0, n * loop.loaded / loop.in_flight - 1)
        if walk and has_idle_tail(code, walk, logits * loaded_a_logit):
            # The tail is a copy of the loop's body, under a mask. It is skipped.
            total -= executed(walk[-1][0])
    instructions, special, loaded = (total / logits).tolist()
    return Cost(instructions, special, loaded, rounds / logits)


def executed(block: Block) -> numpy.ndarray:
    """What a thread executes in a block, as the first three fields of `Cost`."""
    return numpy.array([block.instructions, block.special, block.loaded], float)


def has_idle_tail(code: MachineCode, walk: list[tuple[Block, int]], bytes_: float) -> bool:
    """Whether the code after the loops, for what whole tiles leave, has nothing to do."""
    last = walk[-1][0]
    whole = sum(n * loop.loaded for loop, n in walk) == bytes_
    return whole and not last.masked and code.outside.loaded >= last.loaded


def is_one_pass(code: MachineCode) -> bool:
    """Whether rows are walked twice, once for their sums and once for their gradient."""
    return {bool(loop.stored) for loop in code.loops} == {False, True}


def predict(code: MachineCode, work: Work, chip: Chip) -> Prediction:
    a_logit = cost(code, work)
    programs = resident_programs(chip, code.usage.registers, work.threads, code.usage.shared)
    programs = min(programs, ceil(work.programs / chip.multiprocessors))
    if not programs:
        raise ValueError(f"A program of {work.threads} threads does not fit a multiprocessor of the {chip.name}.")
    resident_rows = min(work.rows, programs * chip.multiprocessors * work.rows_a_program)
    reads = 1.0
    if is_one_pass(code):
        reads = lru.reads(resident_rows, work.classes * work.itemsize, chip.l2, work.in_place, work.backwards)

    roof = chip.bandwidth / work.bytes_a_logit  # logits a second
    cycles = chip.multiprocessors * chip.clock
    threads = programs * work.threads
    moved = work.itemsize * (reads + work.writes)
    rates = {
        "bytes": roof,
        "issue slots": cycles * chip.issue_slots * chip.warp_size * ISSUE_SHARE / a_logit.instructions,
        "special functions": cycles * chip.special_units / a_logit.special if a_logit.special else float("inf"),
        "bytes in flight": chip.multiprocessors * threads * a_logit.in_flight / LATENCY / a_logit.loaded,
        "L2 misses": chip.bandwidth / moved,
    }
    bounds = {name: min(1.0, rate / roof) for name, rate in rates.items()}
    return Prediction(chip.name, threads, resident_rows, reads, bounds, 1 / (roof * min(bounds.values())))
