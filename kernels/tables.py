"""Launch tables as data: for every kernel, the program for rows of a given size in bytes, and the reason for it.

`tables.json` has the measured tables by device name; `python -m bench.tune` writes it. A device that it does not name
gets the arithmetic table, which follows from the hardware: a thread with 16 logits of 16 bits has two 16-byte loads in
flight, and the 1536 threads of a multiprocessor have 48 KB in flight. About 40 KB hide the latency of HBM3.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("tables.json")

#: Numbers of warps that a program may have. A kernel with many features takes up to 255 registers per thread, which a
#: multiprocessor has for 8 warps. The table of the one pass is for its plain variant, which takes 64 registers, or 128
#: with 32 logits or more. That of the one pass that keeps its row on the chip is for its plain variant too, for aligned
#: rows, and its warps are those of all programs of a multiprocessor.
WARPS = {
    "forward": (1, 2, 4, 8),
    "backward": (1, 2, 4, 8),
    "one_pass": (1, 2, 4, 8, 16, 32),
    "on_chip": (8, 16, 32),
}

#: The kernels that do without a ladder.
ARITHMETIC_ALONE = ("one_pass", "on_chip")

#: Logits that a thread may read at a time: whole accesses of 16 bytes, of any dtype.
THREAD_LOGITS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Program:
    """One program: its warps, the logits that a thread reads at a time, and the most tiles that it takes.

    `programs` is the number of programs that a multiprocessor should have. Forward and backward split rows where there
    are fewer; the one-pass kernel launches as many.
    """

    num_warps: int
    thread_logits: int = 16
    tiles: int | None = None  # of backward, None for a whole row; on the chip, of a piece that is copied
    programs: int = 1


#: (largest row in bytes or None, program); the first entry that fits is taken.
Ladder = tuple[tuple[int | None, Program], ...]


@dataclass(frozen=True, eq=False)
class Table:
    """A ladder for every kernel; `arch` is the architecture that it was measured on, `reason` says how.

    Without a ladder for the one pass, its programs follow from the size of the L2 cache; without one for the one pass
    on the chip, from registers and shared memory. Tables are equal only to themselves: launches are cached by table, so
    its hash, which every call takes, has to be cheap.
    """

    forward: Ladder
    backward: Ladder
    one_pass: Ladder
    reason: str
    arch: int | str | None = None
    on_chip: Ladder = ()


ARITHMETIC = Table(
    forward=((16384, Program(4, programs=4)), (None, Program(8, programs=4))),
    backward=((16384, Program(4, tiles=4, programs=4)), (None, Program(8, tiles=4, programs=4))),
    one_pass=(),
    reason="arithmetic, see the top of the file",
)


def fitting(ladder: Ladder, row_bytes: int) -> Program:
    return next(program for limit, program in ladder if limit is None or row_bytes <= limit)


def read(path: Path = FILE) -> dict[str, Table]:
    """The tables of a file by device. An entry's "measured" is for human readers, and ignored."""
    return {device: _table(path, device, entry) for device, entry in json.loads(path.read_text()).items()}


def _table(path: Path, device: str, entry: dict) -> Table:
    def check(fine: bool, problem: str) -> None:
        if not fine:
            raise ValueError(f"{path}, {device!r}: {problem}. Write the table again with python -m bench.tune.")

    check(
        entry.keys() == {*WARPS, "reason", "arch"}, f"expected {', '.join(WARPS)}, reason and arch, got {sorted(entry)}"
    )
    ladders = {}
    for operation in WARPS:
        steps = []
        for step in entry[operation]:
            names = {field.name for field in fields(Program)}
            check(step.keys() - {"measured"} == {"row_bytes", *names}, f"{operation} has a step of {sorted(step)}")
            program = Program(**{name: step[name] for name in names})
            check(program.num_warps in WARPS[operation], f"{operation} has num_warps={program.num_warps}")
            check(program.thread_logits in THREAD_LOGITS, f"{operation} has thread_logits={program.thread_logits}")
            fits = operation != "one_pass" or program.thread_logits <= 16 or program.num_warps <= 16
            check(fits, f"{operation} has {program}, for which a multiprocessor has too few registers")
            check(program.programs > 0 and program.tiles != 0, f"{operation} has {program}")
            check(operation != "on_chip" or program.tiles in (1, 2, 4, 8), f"{operation} has tiles={program.tiles}")
            steps.append((step["row_bytes"], program))
        check(bool(steps) or operation in ARITHMETIC_ALONE, f"{operation} has no step")
        if steps:
            *limits, last = [limit for limit, _ in steps]
            ascending = limits == sorted(set(limits) - {None})
            check(ascending and last is None, f"{operation} has row_bytes {[*limits, last]}; the last has to be null")
        ladders[operation] = tuple(steps)
    return Table(**ladders, reason=entry["reason"], arch=entry["arch"])


#: The measured tables, by device.
TABLES = read()
