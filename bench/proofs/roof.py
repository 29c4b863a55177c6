"""Predicts a kernel's time, and its share of the memory roof, from its machine code and the data of a chip.

A multiprocessor's programs take turns at its issue slots, and each waits for what it loads. How often one of them is
done follows from mean value analysis, which has no constant of its own. Memory moves the bytes of all multiprocessors
at a share of the vendor's figure. Neither hides the other completely: the time is the root of the sum of their squares.

The constants come from published times of other kernels; see `bench.proofs.calibrating`, which tells how far
predictions are off. A prediction is no measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, hypot
from typing import Protocol, TypeVar

import numpy

from . import lru
from .chips import Chip, resident_programs


@dataclass(frozen=True)
class Constants:
    """What data sheets do not say of a chip."""

    stream: float  # the share of its bandwidth that a stream reaches
    cache: float  # the share of its L2 cache that keeps what is read again
    wait: float  # seconds from a load to its data


#: The constants that fit published times best: `python -m bench.proofs.calibrating`.
FITTED = Constants(stream=0.904, cache=0.7, wait=0.464e-6)


class Stretch(Protocol):
    """What is read of a stretch of machine code: `machine_code.Block`, or published counts of one."""

    @property
    def instructions(self) -> int: ...
    @property
    def special(self) -> int: ...
    @property
    def loaded(self) -> int: ...
    @property
    def loaded_shared(self) -> int: ...
    @property
    def stored(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def masked(self) -> bool: ...


class Resources(Protocol):
    @property
    def registers(self) -> int: ...
    @property
    def shared(self) -> int: ...


class Code(Protocol):
    """What is read of a kernel: `machine_code.MachineCode`, or published counts of one."""

    @property
    def usage(self) -> Resources: ...
    @property
    def outside(self) -> Stretch: ...
    @property
    def loops(self) -> Sequence[Stretch]: ...
    @property
    def held(self) -> Sequence[Stretch]: ...
    @property
    def pieces(self) -> Stretch: ...
    @property
    def rounds(self) -> int: ...


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
    shared: int = 0  # logits of a row that shared memory keeps from its first walk to its second
    kept: int = 0  # and that registers keep
    pieces: int = 0  # in which those in shared memory are copied there

    @property
    def logits_a_program(self) -> float:
        """The logits that a program handles between two executions of the code outside of the loops."""
        return min(self.rows * self.classes / self.programs, self.classes * self.rows_a_program)

    @property
    def again(self) -> float:
        """The share of a row that a second walk reads from global memory."""
        return max(0.0, 1 - (self.shared + self.kept) / self.classes)

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


@dataclass(frozen=True)
class Demand:
    """What a program asks of a multiprocessor per logit, and how many programs ask."""

    issue: float  # seconds of its issue slots
    special: float  # seconds of its special-function units
    rounds: float  # how often the program waits for memory
    programs: int  # that a multiprocessor holds
    multiprocessors: int
    rows: int  # in flight on the chip
    reads: int  # how often a row is read, wherever from

    def multiprocessor(self, wait: float) -> float:
        """Seconds per logit of all programs, if memory had no limit but the time to wait for it."""
        busy, away = max(self.issue, self.special), self.rounds * wait
        queue = seconds = 0.0
        for programs in range(1, self.programs + 1):
            here = busy * (1 + queue)  # a program finds those in front of it that are there with one program less
            seconds = (away + here) / programs
            queue = here / seconds
        return seconds / self.multiprocessors


@dataclass(frozen=True)
class Prediction:
    chip: str
    resident_threads: int
    resident_rows: int
    hbm_reads: float  # how often each logit is read from device memory
    bounds: dict[str, float]  # the share of the roof that each limit alone would leave
    seconds_a_logit: float
    share: float  # of the memory roof; below each of the bounds

    @property
    def limit(self) -> str:
        return min(self.bounds, key=self.bounds.__getitem__)


Loop = TypeVar("Loop", bound=Stretch)


def trips(loops: Iterable[Loop], logits: float, loaded_a_logit: float) -> list[tuple[Loop, int]]:
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


def cost(code: Code, work: Work) -> Cost:
    """The cost per logit, from the loops and from the code that is executed once."""
    logits = work.logits_a_program / work.threads
    loaded_a_logit = work.loaded_a_logit or work.itemsize
    total, rounds = executed(code.outside), float(code.rounds)
    loops = [loop for loop in code.loops if not (work.kept and loop.loaded_shared)]
    if work.kept:
        # Nobody waits for the copies to shared memory, which are made while another row's gradient is written.
        for loop in (loop for loop in (*code.held, *code.loops) if loop.loaded_shared):
            total += executed(loop) * work.shared * work.itemsize / work.threads / loop.loaded_shared
        total += executed(code.pieces) * work.pieces
    # In one pass, loops that store belong to the second walk over the row, loops that only load to the first.
    for stores in (False, True):
        walk = trips((b for b in loops if bool(b.stored) == stores), logits * work.again, loaded_a_logit)
        for loop, n in walk:
            total += n * executed(loop)
            rounds += max(0.0, n * loop.loaded / loop.in_flight - 1)
        if walk and has_idle_tail(code, walk, logits * loaded_a_logit):
            # The tail is a copy of the loop's body, under a mask. It is skipped.
            total -= executed(walk[-1][0])
    # No load of the second walk is asked for before the sums of the first are there.
    rounds += is_one_pass(code) and work.again > 0
    instructions, special, loaded = (total / logits).tolist()
    return Cost(instructions, special, loaded, rounds / logits)


def executed(block: Stretch) -> numpy.ndarray:
    """What a thread executes in a block, as the first three fields of `Cost`."""
    return numpy.array([block.instructions, block.special, block.loaded], float)


def has_idle_tail(code: Code, walk: Sequence[tuple[Stretch, int]], bytes_: float) -> bool:
    """Whether the code after the loops, for what whole tiles leave, has nothing to do."""
    last = walk[-1][0]
    whole = sum(n * loop.loaded for loop, n in walk) == bytes_
    return whole and not last.masked and code.outside.loaded >= last.loaded


def is_one_pass(code: Code) -> bool:
    """Whether rows are walked twice, once for their sums and once for their gradient."""
    return {bool(loop.stored) for loop in code.loops} == {False, True}


def demand(code: Code, work: Work, chip: Chip) -> Demand:
    a_logit = cost(code, work)
    programs = resident_programs(chip, code.usage.registers, work.threads, code.usage.shared)
    programs = min(programs, ceil(work.programs / chip.multiprocessors))
    if not programs:
        raise ValueError(f"A program of {work.threads} threads does not fit a multiprocessor of the {chip.name}.")
    return Demand(
        issue=a_logit.instructions / (chip.warp_size * chip.issue_slots * chip.clock),
        special=a_logit.special / (chip.special_units * chip.clock),
        rounds=a_logit.rounds / work.threads,
        programs=programs,
        multiprocessors=chip.multiprocessors,
        rows=min(work.rows, programs * chip.multiprocessors * work.rows_a_program),
        reads=2 if is_one_pass(code) and work.again > 0 else 1,
    )


def hbm_reads(needed: Demand, work: Work, chip: Chip, cache: float) -> float:
    """How often a logit is read from device memory, the first time and where the L2 cache has lost it."""
    if needed.reads == 1:
        return 1.0
    return lru.reads(
        needed.rows, work.classes * work.itemsize, int(cache * chip.l2), work.in_place, work.backwards, work.again
    )


def seconds(needed: Demand, work: Work, chip: Chip, constants: Constants) -> float:
    """The time per logit."""
    reads = hbm_reads(needed, work, chip, constants.cache)
    return hypot(needed.multiprocessor(constants.wait), moving(reads, work, chip, constants))


def moving(reads: float, work: Work, chip: Chip, constants: Constants) -> float:
    """Seconds in which memory moves what is read and written per logit."""
    return work.itemsize * (reads + work.writes) / (constants.stream * chip.bandwidth)


def predict(code: Code, work: Work, chip: Chip, constants: Constants = FITTED) -> Prediction:
    needed = demand(code, work, chip)
    reads = hbm_reads(needed, work, chip, constants.cache)
    roof = work.bytes_a_logit / chip.bandwidth  # seconds a logit
    alone = {
        "bytes": moving(1.0, work, chip, constants),
        "issue slots": needed.issue / chip.multiprocessors,
        "special functions": needed.special / chip.multiprocessors,
        "waiting": needed.rounds * constants.wait / needed.programs / chip.multiprocessors,
        "L2 misses": moving(reads, work, chip, constants),
    }
    time = seconds(needed, work, chip, constants)
    bounds = {name: min(1.0, roof / took) if took else 1.0 for name, took in alone.items()}
    threads = needed.programs * work.threads
    return Prediction(chip.name, threads, needed.rows, reads, bounds, time, roof / time)
