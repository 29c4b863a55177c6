"""Translates a kernel from PTX to C.

The code is cut into segments: straight pieces, which end where threads may part (a branch) or meet (a barrier, a
shuffle). A segment is a function that runs every thread of a group through the piece, one after the other. What a later
segment reads is kept in an array over threads; everything else is a local variable of the thread's turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .accesses import access, copy
from .instructions import expression, width
from .ptx import Function, Instruction, NotUnderstood
from .synchronising import is_synchronising, synchronised

HERE = Path(__file__).parent

#: What a thread reads of itself and of its program.
SPECIAL = {f"%{name}.{axis}": value.format(i) for i, axis in enumerate("xyz") for name, value in (
    ("ctaid", "program[{}]"), ("nctaid", "programs[{}]"), ("tid", "t" if i == 0 else "0"),
    ("ntid", "THREADS" if i == 0 else "1"),
)} | {"%laneid": "(t & 31)", "%warpid": "(t >> 5)"}  # fmt: skip

#: Ends of a segment.
BRANCHES, ENDS = {"bra", "bra.uni"}, {"ret", "exit"}
BARRIERS = {"bar.sync", "barrier.sync", "barrier.sync.aligned"}

#: What a thread may have in flight: copies that it does not wait for.
COPIES = 512


@dataclass
class Segment:
    number: int
    code: list[tuple[int, Instruction]] = field(default_factory=list)  # with numbers of instructions


@dataclass
class Translation:
    """C, and what its numbers of instructions and segments stand for."""

    function: Function
    source: str
    instructions: list[Instruction]
    segments: list[list[int]]  # numbers of instructions
    offsets: dict[str, int]  # of parameters


class Translator:
    def __init__(self, function: Function, shared: int) -> None:
        self.function = function
        self.instructions: list[Instruction] = []
        self.segments: list[Segment] = []
        self.labels: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        self.end = 0  # of the parameters
        for name, kind in function.parameters.items():
            size = width(kind) // 8
            self.end = -(-self.end // size) * size
            self.offsets[name] = self.end
            self.end += size
        self.symbols = {name: f"(u64)(uintptr_t)constant_{c_name(name)}" for name in function.constants}
        start = 0
        for name, size in function.shared.items():
            self.symbols[name] = f"(SHARED_START + {start}u)"
            start += -(-size // 16) * 16
        self.shared = start + shared

    def translate(self) -> Translation:
        self._cut()
        reads = [set(self._first_read(segment)) for segment in self.segments]
        self.kept = set().union(*reads) if reads else set()
        bodies = [self._segment(segment) for segment in self.segments]
        f = self.function
        copies = COPIES if any("cp.async" in i.name for i in self.instructions) else 0
        lines = [
            f"enum {{ THREADS = {f.threads}, WARPS = {-(-f.threads // 32)}, SHARED_BYTES = {self.shared}, "
            f"COPIES = {copies}, INSTRUCTIONS = {len(self.instructions)} }};",
            '#include "numbers.h"',
            '#include "memory.h"',
            f"static u8 parameters[{max(self.end, 1)}];",
            "static int at[THREADS], diverged, progress;",
            f"static u64 threads_run[{len(bodies)}], warps_run[{len(bodies)}];",
            *(f"static const u8 constant_{c_name(name)}[] = {{{','.join(map(str, value))}}};"
              for name, value in f.constants.items()),
            "static struct { int unused;",
            *(f"{self.type_of(name)} {c_name(name)}[THREADS];" for name in sorted(self.kept)),
            "} registers;",
            '#include "warps.h"',
            *bodies,
            f"static int (*segments[])(int, int) = {{{', '.join(f'segment_{s.number}' for s in self.segments)}}};",
            f"static const int first_instruction[] = {{{', '.join(str(s.code[0][0]) for s in self.segments)}}};",
            '#include "running.h"',
        ]  # fmt: skip
        numbers = [[number for number, _ in segment.code] for segment in self.segments]
        return Translation(f, "\n".join(lines), self.instructions, numbers, self.offsets)

    # ---- Segments

    def _cut(self) -> None:
        self._begin()
        for label, instructions in self.function.blocks:
            if label:
                if self.segments[-1].code:
                    self._begin()
                self.labels[label] = self.segments[-1].number
            for instruction in instructions:
                alone = is_synchronising(instruction)
                if alone and self.segments[-1].code:
                    self._begin()
                self.segments[-1].code.append((len(self.instructions), instruction))
                self.instructions.append(instruction)
                if alone or instruction.name in BRANCHES | ENDS | BARRIERS | {"trap"}:
                    self._begin()
        if not self.segments[-1].code:
            self.segments.pop()

    def _begin(self) -> None:
        self.segments.append(Segment(len(self.segments)))

    def _first_read(self, segment: Segment) -> Iterator[str]:
        """The registers that a segment reads, or leaves as they are for some threads, before it writes them."""
        written: set[str] = set()
        for _, instruction in segment.code:
            results, operands = self.results_and_operands(instruction)
            yield from (name for name in operands if name not in written)
            if instruction.guard:
                yield from (name for name in results if name not in written)
            else:
                written.update(results)

    def results_and_operands(self, instruction: Instruction) -> tuple[list[str], list[str]]:
        name = instruction.name
        no_result = name.startswith(
            ("st.", "bra", "bar", "stmatrix", "cp.async", "call", "ret", "exit", "trap", "fence")
        )
        results = [] if no_result else self.registers_in(instruction.operands[0])
        if name.startswith("st.param"):  # writes the argument of a call
            results = self.registers_in(instruction.operands[0])
        operands = [r for text in instruction.operands[not no_result :] for r in self.registers_in(text)]
        return results, [*operands, *self.registers_in(instruction.guard)]

    def registers_in(self, text: str) -> list[str]:
        return [name for name in re.findall(r"[%$\w.]+", text) if self.is_register(name)]

    def is_register(self, name: str) -> bool:
        return name in self.function.registers or name.rstrip("0123456789") in self.function.registers

    def type_of(self, name: str) -> str:
        """The C type of a register."""
        kinds = self.function.registers
        kind = kinds.get(name) or kinds[name.rstrip("0123456789")]
        return "pred" if kind == "pred" else f"u{width(kind)}"

    def _segment(self, segment: Segment) -> str:
        number, code = segment.number, segment.code
        head = f"static int segment_{number}(int from, int to) {{"
        if is_synchronising(code[0][1]):
            return "\n".join([head, *synchronised(self, number, *code[0])])
        incoming = dict.fromkeys(self._first_read(segment))
        outgoing = dict.fromkeys(r for _, i in code for r in self.results_and_operands(i)[0])
        lines = [
            head,
            "int warp = -1;",
            f"for (int t = from; t < to; t++) {{ if (diverged && at[t] != {number}) continue;",
        ]
        lines.append(f"threads_run[{number}]++; if (warp != t >> 5) warp = t >> 5, warps_run[{number}]++;")
        lines += [
            f"{self.type_of(r)} {c_name(r)}{f' = registers.{c_name(r)}[t]' if r in incoming else ''};"
            for r in incoming | outgoing
        ]
        last = code[-1][1]
        closing = last.name in BRANCHES | ENDS | BARRIERS
        for at, instruction in code[: -1 if closing else None]:
            lines.append(self.guarded(instruction, self._statement(at, instruction)))
        lines += [f"registers.{c_name(r)}[t] = {c_name(r)};" for r in outgoing if r in self.kept]
        following, chosen = str(number + 1), ""
        if last.name in BRANCHES:
            target = str(self.labels[last.operands[0]])
            following, chosen = (target, "") if not last.guard else ("-1", self._branch(last, target, following))
        elif last.name in ENDS:
            following, chosen = "-1", self._branch(last, "EXITED", following)
        elif last.name in BARRIERS:
            if last.operands != ("0",) or last.guard:
                raise NotUnderstood(f"a barrier that is not for all threads: {last}")
            following, chosen = "-1", f"at[t] = WAITING + {number + 1};"
        lines.append(chosen or f"if (diverged) at[t] = {following};")
        lines.append(f"}} return {following if following == '-1' else f'diverged ? -1 : {following}'}; }}")
        return "\n".join(lines)

    def _branch(self, instruction: Instruction, target: str, following: str) -> str:
        condition = c_name(instruction.guard) if instruction.guard else "1"
        return f"at[t] = {condition} ? {target} : {following};"

    # ---- Instructions

    def guarded(self, instruction: Instruction, statement: str) -> str:
        return f"if ({c_name(instruction.guard)}) {{ {statement} }}" if instruction.guard else statement

    def value(self, text: str) -> str:
        """An operand as an expression of C."""
        if text in SPECIAL:
            return SPECIAL[text]
        if self.is_register(text):
            return c_name(text)
        if text in self.symbols:
            return self.symbols[text]
        if match := re.fullmatch(r"0[fd]([0-9A-F]+)", text):
            return f"0x{match[1]}ull"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return f"{text.rstrip('U')}ll" if text != "-9223372036854775808" else "(-9223372036854775807ll - 1)"
        raise NotUnderstood(f"an unknown operand: {text}")

    def address(self, text: str) -> str:
        """[%rd1+8] as a number."""
        match = re.fullmatch(r"\[([%$\w]+)(?:\+(-?\d+))?\]", text)
        if match is None:
            raise NotUnderstood(f"an unknown address: {text}")
        return f"({self.value(match[1])} + {match[2] or 0}ll)"

    def assign(self, result: str, value: str) -> str:
        return f"{c_name(result)} = {f'({value}) != 0' if self.type_of(result) == 'pred' else value};"

    def _statement(self, at: int, instruction: Instruction) -> str:
        name, operands = instruction.name, instruction.operands
        if name.startswith(("ld.", "st.")):
            return access(self, at, instruction)
        if name.startswith("cp.async"):
            return copy(self, at, instruction)
        if name == "trap":
            return f"fail(TRAPPED, {at}, t, 0, 0, 0);"
        if name == "call.uni" and operands[0] == "__assertfail":
            message = self.registers_in(operands[1])[0]
            return f"failure.message = {c_name(message)}; fail(ASSERTED, {at}, t, 0, 0, 0);"
        if re.fullmatch(r"createpolicy\.fractional\.L2::evict_\w+\.b64", name) and operands[1:] == ("1.0",):
            return self.assign(operands[0], "0")  # a hint for the cache
        if name.startswith("mov.") and len(operands) == 2 and "{" in operands[0] + operands[1]:
            return self._repack(instruction)
        if match := re.fullmatch(r"(setp\.\w+)\.(f16|bf16)x2", name):
            parts = [f"(u16)({self.value(x)} >> {{0}})" for x in operands[1:]]
            one = Instruction(f"{match[1]}.{match[2]}", operands)
            both = [expression(one, [part.format(shift) for part in parts]) for shift in (0, 16)]
            return " ".join(self.assign(r, v) for r, v in zip(operands[0].split("|"), both, strict=True))
        if not operands or not self.is_register(operands[0]):
            raise NotUnderstood(f"unknown instruction: {instruction}")
        return self.assign(operands[0], expression(instruction, [self.value(text) for text in operands[1:]]))

    def _repack(self, instruction: Instruction) -> str:
        """mov of a register into several, or of several into one; the first is the lowest part."""
        to, source = instruction.operands
        if "{" in to:
            parts = to.strip("{}").split(",")
            step = width(instruction.name.split(".")[1]) // len(parts)
            moved = f"u64 moved = {self.value(source)};"
            taken = [self.assign(r, f"moved >> {i * step}") for i, r in enumerate(parts) if r != "_"]
            return f"{{ {moved} {' '.join(taken)} }}"
        parts = source.strip("{}").split(",")
        step = width(instruction.name.split(".")[1]) // len(parts)
        return self.assign(to, " | ".join(f"(u64)(u{step}){self.value(x)} << {i * step}" for i, x in enumerate(parts)))


def c_name(register: str) -> str:
    """%rd12 as rd12, !%p1 as !p1, and a name that C reserves as another one."""
    text = re.sub(r"[%]", "", register)
    return re.sub(r"[^!\w]", "_", text)


def translate(function: Function, shared: int) -> Translation:
    """`shared` is how many bytes of shared memory the launch gives a program."""
    return Translator(function, shared).translate()
