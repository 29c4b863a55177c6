"""Reads machine code of NVIDIA GPUs: what a thread executes in the loops of a kernel, and outside of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .dataflow import peak_bytes, rounds

#: Opcodes that the special-function units execute, at a quarter or an eighth of the rate of others.
SPECIAL = {"MUFU", "FRND", "F2I", "I2F", "F2F"}

#: Bytes of an instruction.
INSTRUCTION = 16

#: Opcodes at which the threads of a program, or of a warp, wait for each other.
BARRIERS = {"BAR", "WARPSYNC"}
SHUFFLES = {"SHFL", "REDUX"}

GLOBAL_LOADS = {"LDG", "LDGSTS"}
GLOBAL_STORES = {"STG"}
SPILLS = {"LDL", "STL"}


@dataclass(frozen=True)
class Instruction:
    """`@!P2 STG.E.128 desc[UR12][R2.64], R4`: a guard, an opcode with its modifiers, and operands."""

    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """The width of a memory access."""
        found = re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(found[1]) // 8 if found else 4


@dataclass(frozen=True)
class Block:
    """A stretch of code that a thread executes, and counts of what is in it."""

    code: tuple[Instruction, ...]

    @cached_property
    def names(self) -> Counter[str]:
        return Counter(instruction.name for instruction in self.code)

    def count(self, names: set[str]) -> int:
        return sum(self.names[name] for name in names)

    def bytes(self, names: set[str]) -> int:
        return sum(instruction.bytes for instruction in self.code if instruction.name in names)

    @property
    def instructions(self) -> int:
        return len(self.code) - self.names["NOP"]

    @property
    def special(self) -> int:
        return self.count(SPECIAL)

    @property
    def barriers(self) -> int:
        return self.count(BARRIERS)

    @property
    def shuffles(self) -> int:
        return self.count(SHUFFLES)

    @property
    def spills(self) -> int:
        return self.count(SPILLS)

    @property
    def loaded(self) -> int:
        """Bytes that a thread loads from global memory."""
        return self.bytes(GLOBAL_LOADS)

    @property
    def stored(self) -> int:
        return self.bytes(GLOBAL_STORES)

    @property
    def loaded_shared(self) -> int:
        """Bytes that a thread loads from shared memory by its widest accesses."""
        return sum(i.bytes for i in self.code if i.name == "LDS" and i.bytes == 16)

    @property
    def masked(self) -> bool:
        """Whether a guard may skip some load from global memory."""
        return any(i.guard and not i.guard.startswith("@UP") for i in self.code if i.name in GLOBAL_LOADS)

    @cached_property
    def in_flight(self) -> int:
        """The most bytes that one thread has asked for and not yet used, when the block is executed in a loop."""
        return peak_bytes(self.code * 2, GLOBAL_LOADS)


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class MachineCode:
    """`loops` has the innermost loops that load from global memory, `held` those that load from shared memory alone.

    `pieces` is the code of loops around `held`, except the loop over rows: a row's pieces in shared memory take a round
    each. `outside` is all code but these and `clears`.
    """

    usage: Usage
    outside: Block
    loops: tuple[Block, ...]
    clears: tuple[Block, ...]  # loops that only store: they write zeros where the others do not go
    rounds: int  # how often loads wait for earlier loads, with one iteration of every loop
    held: tuple[Block, ...] = ()
    pieces: Block = Block(())
    loop_bytes: int = 0  # of the longest loop, inner ones included

    @property
    def spills(self) -> int:
        """Bytes of stack per thread or the number of instructions that spill, whichever is larger; 0 without spills."""
        return max(
            self.usage.stack,
            sum(block.spills for block in (self.outside, *self.loops, *self.held, *self.clears, self.pieces)),
        )


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions that `nvdisasm -c` prints, and the positions of its labels among them."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"(\.L_\w+):", line.strip())
        if label:
            labels[label[1]] = len(code)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;", line)
        if found:
            operands = tuple(part.strip() for part in found[3].split(",")) if found[3] else ()
            code.append(Instruction(found[1] or "", found[2], operands))
    return code, labels


def successors(code: Sequence[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction, the positions of those that may be executed next."""
    following = []
    for index, instruction in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", instruction.operands[-1]) if instruction.operands else None
        jumps = instruction.name in ("BRA", "EXIT", "RET", "BRX")
        always = jumps and not instruction.guard and all(not re.match(r"!?U?P\d", o) for o in instruction.operands[:-1])
        then = [] if always or index + 1 == len(code) else [index + 1]
        if instruction.name == "BRA" and target and target[1] in labels and labels[target[1]] < len(code):
            then.append(labels[target[1]])
        following.append(then)
    return following


def natural_loops(following: list[list[int]]) -> list[set[int]]:
    """The bodies of all loops: for a backward jump, the instructions that reach it without passing its target."""
    preceding: list[list[int]] = [[] for _ in following]
    for index, then in enumerate(following):
        for other in then:
            preceding[other].append(index)
    found: dict[int, set[int]] = {}
    for index, then in enumerate(following):
        for head in (other for other in then if other <= index):
            body, pending = {head}, [index]
            while pending:
                node = pending.pop()
                if node not in body:
                    body.add(node)
                    pending += preceding[node]
            found.setdefault(head, set()).update(body)
    return list(found.values())


def read(cubin: bytes) -> MachineCode:
    """The machine code of a kernel."""
    usage = _dump(cubin, "cuobjdump", "--dump-resource-usage")
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return analyse(_dump(cubin, "nvdisasm", "-c"), Usage(used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"]))


def parameter_sizes(cubin: bytes) -> list[int]:
    """The bytes of every parameter of a kernel."""
    parameter = r"Ordinal\s*: 0x(\w+)\s+Offset\s*: 0x\w+\s+Size\s*: 0x(\w+)"
    found = re.findall(parameter, _dump(cubin, "cuobjdump", "--dump-elf"))
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    return [sizes[ordinal] for ordinal in range(len(sizes))]


def _dump(cubin: bytes, tool: str, option: str) -> str:
    """What a tool that comes with Triton prints of a kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [getattr(knobs.nvidia, tool).path, option, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def analyse(listing: str, usage: Usage) -> MachineCode:
    code, labels = parse(listing)
    every = natural_loops(successors(code, labels))
    innermost = [body for body in every if not any(other < body for other in every)]
    loops: list[Block] = []
    clears: list[Block] = []
    held: list[Block] = []
    inside: set[int] = set()
    for body in sorted(innermost, key=min):
        block = _block(code, body)
        if block.loaded or block.loaded_shared or block.stored:
            (loops if block.loaded else held if block.loaded_shared else clears).append(block)
            inside |= body
    longest = max(map(len, every), default=0)
    reads = [body for body in innermost if _block(code, body).loaded_shared]
    around = [body for body in every if len(body) < longest and any(inner < body for inner in reads)]
    pieces = set().union(*around) - inside
    outside = set(range(len(code))) - inside - pieces
    outside -= {i for body in every for i in body if len(body) == 1}  # the trap after the end of the code
    return MachineCode(
        usage, _block(code, outside), tuple(loops), tuple(clears), rounds(code, GLOBAL_LOADS), tuple(held),
        _block(code, pieces), INSTRUCTION * longest,
    )  # fmt: skip


def _block(code: Sequence[Instruction], indices: Iterable[int]) -> Block:
    return Block(tuple(code[i] for i in sorted(indices)))
