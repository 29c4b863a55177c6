"""The search for launch tables: which programs are tried at which shapes, and which of them a table gets.

A program is a choice of warps, logits per thread, tiles per program and programs per multiprocessor. A point is a
kernel and a shape. At every point, all programs that lead to different launches are measured. A vocabulary gets the
program that loses the least time over all of its points. This module measures nothing itself: it is given a clock.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from fused_ignore_ce.kernels import launch as launches
from fused_ignore_ce.kernels import tables
from fused_ignore_ce.kernels.chip import Chip
from fused_ignore_ce.kernels.launch import Launch
from fused_ignore_ce.kernels.tables import ARITHMETIC, Program, Table, fitting
from fused_ignore_ce.kernels.variant import ON_CHIP, ONE_PASS_PLAIN, one_pass_registers

#: Logits are bfloat16. Tables count bytes, so they serve other dtypes, too.
ITEMSIZE = 2

#: The most important first: vocabularies of models, and numbers of rows as in a training step.
VOCABULARIES = (128256, 32000, 151936, 256000, 65536, 16384, 4096, 1024)
ROWS = (8192, 32768, 2048, 256)

#: A program replaces the arithmetic one if it saves at least this share of the time. Less than that is noise.
WORTH = 0.02


class Point(NamedTuple):
    """What is measured: a kernel on N rows of V logits."""

    operation: str  # a field of `Table`
    N: int
    V: int

    def __str__(self) -> str:
        return f"{self.operation.replace('_', ' ')} N={self.N} V={self.V}"


@dataclass(frozen=True)
class Measured:
    """The seconds of every launch at a point, or why it has none. The arithmetic program's launch is the first."""

    point: Point
    seconds: dict[Launch, float | str]

    def loss_of(self, launch: Launch) -> float:
        """Time relative to the best launch's; infinite if the launch failed."""
        own = self.seconds[launch]
        return own / self.best if isinstance(own, float) else math.inf

    @property
    def best(self) -> float:
        return min(own for own in self.seconds.values() if isinstance(own, float))

    @property
    def is_usable(self) -> bool:
        return any(isinstance(own, float) for own in self.seconds.values())


#: Measures a launch at a point, and returns its seconds or why it could not be measured.
Clock = Callable[[Point, Launch], "float | str"]


def operations(chip: Chip) -> tuple[str, ...]:
    """The kernels to tune: of the two one passes, the one that the chip runs."""
    return "forward", "backward", "on_chip" if chip.shared_bytes else "one_pass"


def points(free_bytes: int, chip: Chip) -> list[Point]:
    """The points whose logits and gradient fit, the most important first. All points of a shape follow each other."""
    shapes = [(N, V) for N, V in itertools.product(ROWS, VOCABULARIES) if 2 * N * V * ITEMSIZE <= free_bytes]
    return [Point(operation, *shape) for shape in shapes for operation in operations(chip)]


def arithmetic(operation: str, V: int, chip: Chip) -> Program:
    """The program of a device without a table, which arithmetic chooses."""
    if operation == "one_pass":
        return launches.one_pass_program(V, ITEMSIZE, ONE_PASS_PLAIN, replace(chip, table=ARITHMETIC))
    if operation == "on_chip":
        chosen = launches.on_chip_launch(1, V, ITEMSIZE, True, ON_CHIP["plain"], replace(chip, table=ARITHMETIC))
        assert chosen.held is not None
        variant = ON_CHIP["plain"][chosen.held.HAS_REST or chosen.held.HAS_EDGES]
        return Program(variant.warps, variant.chunks * 8, variant.kept // variant.chunks)
    return fitting(getattr(ARITHMETIC, operation), V * ITEMSIZE)


def candidates(operation: str, V: int, chip: Chip) -> list[Program]:
    """Every program that is tried, the arithmetic one first."""
    if operation == "on_chip":
        # What registers keep of a row is a piece: from 8 logits to 64 a thread.
        found = [
            Program(*each) for each in itertools.product((8, 16, 32), (8, 16, 32), (1, 2, 4)) if each[1] * each[2] <= 64
        ]
        return list(dict.fromkeys([arithmetic(operation, V, chip), *found]))
    warps = (2, 4, 8) if operation != "one_pass" else (4, 8, 16, 32)
    tiles = (1, 2, 4, 8, None) if operation == "backward" else (None,)
    found = [Program(*each) for each in itertools.product(warps, (8, 16, 32), tiles, (1, 2, 4, 8))]
    if operation == "one_pass":
        found = [program for program in found if _has_room(program, chip)]
    return list(dict.fromkeys([arithmetic(operation, V, chip), *found]))


def _has_room(program: Program, chip: Chip) -> bool:
    """Whether a multiprocessor has the registers for all threads of the one pass."""
    registers = one_pass_registers(ONE_PASS_PLAIN, program.thread_logits)
    return program.num_warps * chip.warp_size * program.programs * registers <= launches.REGISTERS


def launch_of(program: Program, point: Point, chip: Chip) -> Launch:
    """How the launchers would launch the kernel if their table had only this program."""
    ladder = ((None, program),)
    on = replace(chip, table=Table(ladder, ladder, ladder, "a candidate", on_chip=ladder))
    aligned = point.V % 8 == 0
    if point.operation == "one_pass":
        return launches.one_pass_launch(point.N, point.V, ITEMSIZE, aligned, ONE_PASS_PLAIN, on)
    if point.operation == "on_chip":
        return launches.on_chip_launch(point.N, point.V, ITEMSIZE, aligned, ON_CHIP["plain"], on)
    choose = launches.forward_launch if point.operation == "forward" else launches.backward_launch
    return choose(1, point.N, point.V, ITEMSIZE, True, aligned, on)


def search(
    todo: Iterable[Point], chip: Chip, clock: Clock, in_time: Callable[[], bool]
) -> tuple[list[Measured], list[Point]]:
    """(points whose launches were all measured, points that there was no time for)."""
    found, left_out = [], []
    for point in todo:
        seconds: dict[Launch, float | str] = {}
        for program in candidates(point.operation, point.V, chip):
            if not in_time():
                break
            launch = launch_of(program, point, chip)
            if launch not in seconds:
                seconds[launch] = clock(point, launch)
        else:
            found.append(Measured(point, seconds))
            continue
        left_out.append(point)
    return found, left_out


def choose(operation: str, V: int, measured: list[Measured], chip: Chip) -> Program | None:
    """The program that loses the least over the points of a vocabulary; None where no point was measured."""
    own = [each for each in measured if (each.point.operation, each.point.V) == (operation, V) and each.is_usable]
    if not own:
        return None

    def loss(program: Program) -> float:
        return statistics.fmean(each.loss_of(launch_of(program, each.point, chip)) for each in own)

    first, *others = candidates(operation, V, chip)
    best = min(others, key=loss)
    return best if loss(best) < (1 - WORTH) * loss(first) else first


def steps(operation: str, measured: list[Measured], chip: Chip) -> list[dict[str, Any]]:
    """A ladder as `tables.json` has it. A program ends at the geometric mean of its vocabulary and the next one."""
    found: list[dict[str, Any]] = []
    vocabularies = sorted({each.point.V for each in measured})
    chosen = [(V, program) for V in vocabularies if (program := choose(operation, V, measured, chip)) is not None]
    for index, (V, program) in enumerate(chosen):
        limit = None if index + 1 == len(chosen) else round(ITEMSIZE * math.sqrt(V * chosen[index + 1][0]))
        reasons = [_reason(program, each, chip) for each in measured if each.point[::2] == (operation, V)]
        if found and all(found[-1][name] == value for name, value in asdict(program).items()):
            found[-1] |= {"row_bytes": limit, "measured": found[-1]["measured"] + reasons}
        else:
            found.append({"row_bytes": limit, **asdict(program), "measured": reasons})
    return found


def _reason(program: Program, measured: Measured, chip: Chip) -> dict[str, Any]:
    """One reason for a step: at a point, the times of its program, of the arithmetic program and of the best one."""
    seconds = list(measured.seconds.values())
    times = measured.seconds[launch_of(program, measured.point, chip)], seconds[0], measured.best
    names = ("microseconds", "arithmetic", "best")
    return {"N": measured.point.N, "V": measured.point.V} | {
        name: round(1e6 * time, 2) if isinstance(time, float) else time
        for name, time in zip(names, times, strict=True)
    }  # fmt: skip


def entry(measured: list[Measured], chip: Chip, reason: str) -> dict[str, Any]:
    """A device's entry in `tables.json`. A kernel that was not measured keeps the arithmetic ladder."""
    found: dict[str, Any] = {"reason": reason, "arch": chip.arch}
    for operation in tables.WARPS:
        kept = [
            {"row_bytes": limit, **asdict(program), "measured": []}
            for limit, program in getattr(ARITHMETIC, operation)
        ]  # fmt: skip
        found[operation] = steps(operation, [m for m in measured if m.is_usable], chip) or kept
    return found
