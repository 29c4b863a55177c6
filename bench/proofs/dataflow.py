"""Finds which loads of a kernel wait for which others, by following registers through its machine code.

Predictions need the bytes that a thread has in flight. The assembler decides them when it orders instructions, so that
executing PTX (`emulator/`), which is what the assembler is given, does not tell them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .machine_code import Instruction

#: Opcodes without a result that another instruction reads.
_NO_RESULT = {"STG", "STS", "STL", "BRA", "EXIT", "BAR", "BSSY", "BSYNC", "NOP", "RET", "CALL", "WARPSYNC", "DEPBAR"}

#: Opcodes whose second operand is a result too.
_TWO_RESULTS = {"SHFL", "ATOMG", "ATOMS", "ATOM"}


def results(instruction: Instruction) -> set[str]:
    """Registers and predicates that an instruction writes."""
    if instruction.name in _NO_RESULT or not instruction.operands:
        return set()
    first, *others = instruction.operands
    written = registers(first, _width(instruction))
    if instruction.name in _TWO_RESULTS and others:
        return written | registers(others[0], _width(instruction))
    # A comparison has two results. An addition may also write carries, which follow its sum.
    for operand in others[: 1 if re.match(r"U?P", first) else 2]:
        if not re.fullmatch(r"U?P[T\d]+", operand):
            break
        written |= registers(operand)
    return written


def operands_read(instruction: Instruction) -> set[str]:
    """Registers and predicates that an instruction reads, including its guard."""
    written = results(instruction)
    read = registers(instruction.guard)
    skipped = 0 if instruction.name in _NO_RESULT else 1
    for operand in instruction.operands[skipped:]:
        width = _width(instruction) if instruction.name in ("STG", "STS", "STL") and "[" not in operand else 1
        found = registers(operand, width)
        read |= found if not (re.fullmatch(r"U?P[T\d]+", operand) and found <= written) else set()
    return read


def registers(operand: str, width: int = 1) -> set[str]:
    """The registers that an operand names. `R4.64` names two.

    >>> sorted(registers("desc[UR12][R2.64+0x4000]"))
    ['R2', 'R3', 'UR12']
    """
    found = set()
    for name, number, wide in re.findall(r"\b(UR|UP|R|P)(\d+)(\.64)?", operand):
        count = 2 if wide else width if name in ("R", "UR") else 1
        found |= {f"{name}{int(number) + i}" for i in range(count)}
    return found


def _width(instruction: Instruction) -> int:
    """How many registers hold a result, or a stored value."""
    if re.search(r"\.(128|256)\b", instruction.opcode):
        return instruction.bytes // 4
    return 2 if re.search(r"\.(64|WIDE)\b", instruction.opcode) or instruction.name.startswith("D") else 1


def peak_bytes(code: Iterable[Instruction], loads: set[str]) -> int:
    """The most bytes that are loaded and not yet used at any time, while `code` is executed in its order."""
    waiting: dict[str, int] = {}  # register -> number of the load
    size: dict[int, int] = {}
    peak = 0
    for number, instruction in enumerate(code):
        for register in operands_read(instruction) | results(instruction):
            size.pop(waiting.get(register, -1), None)
        if instruction.name in loads:
            size[number] = instruction.bytes
            waiting.update(dict.fromkeys(results(instruction), number))
            peak = max(peak, sum(size.values()))
    return peak


def rounds(code: Sequence[Instruction], loads: set[str]) -> int:
    """How many times the code waits for memory, with one iteration of every loop.

    A load whose address or execution depends on a loaded value is one round later than that value.
    """
    ready: dict[str, int] = {}  # register -> the round after which its value is there
    entered = 0  # the round after which it is decided that execution comes here
    last = 0
    for instruction in code:
        round_ = max([entered, *(ready.get(register, 0) for register in operands_read(instruction))])
        if instruction.name in ("BRA", "EXIT") and instruction.guard:
            entered = max(entered, round_)
        if instruction.name in loads:
            round_ += 1
            last = max(last, round_)
        for register in results(instruction):
            # A guard may prevent the write, so the register may still have its old value.
            ready[register] = max(round_, ready.get(register, 0)) if instruction.guard else round_
    return last
