"""Translates accesses to memory: loads, stores, and copies that nobody waits for. `memory.h` has what they call."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .instructions import width
from .ptx import Instruction, NotUnderstood

if TYPE_CHECKING:
    from .translating import Translator

#: Words in the name of a load or store that change nothing in what it does.
HINTS = re.compile(r"L1::evict_\w+|L1::no_allocate|L2::\w+|nc|ca|cg|cs|wb|weak")


def access(tr: Translator, at: int, instruction: Instruction) -> str:
    """A load or store of one or several registers."""
    what, space, *words = instruction.name.split(".")
    kind = words.pop()
    number = int(words.pop()[1:]) if words and re.fullmatch(r"v[248]", words[-1]) else 1
    hinted = "L2::cache_hint" in words
    known = all(HINTS.fullmatch(word) for word in words) and space in ("global", "shared", "param")
    if not known or len(instruction.operands) != 2 + hinted:
        raise NotUnderstood(f"unknown access to memory: {instruction}")
    place, values = instruction.operands[:2] if what == "st" else instruction.operands[1::-1]
    registers = values.strip("{}").split(",")
    if len(registers) != number:
        raise NotUnderstood(f"unknown access to memory: {instruction}")
    size = width(kind) // 8
    item = f"{'s' if kind[0] == 's' else 'u'}{8 * size}"
    if space == "param":
        return _parameter(tr, what, item, place, registers, instruction)
    where = f"{tr.address(place)}, {{}}{number * size}, {at}, t"
    if what == "ld":
        loaded = [tr.assign(r, f"(({item} *)loaded)[{i}]") for i, r in enumerate(registers)]
        return f"{{ const u8 *loaded = load_{space}({where.format('')}); {' '.join(loaded)} }}"
    stored = ", ".join(f"({item})({tr.value(r)})" for r in registers)
    return f"{{ {item} stored[] = {{{stored}}}; store_{space}({where.format('stored, ')}); }}"


def _parameter(tr: Translator, what: str, item: str, place: str, registers: list[str], instruction: Instruction) -> str:
    match = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", place)
    if match is None or len(registers) != 1:
        raise NotUnderstood(f"unknown access to a parameter: {instruction}")
    if what == "st":
        return tr.assign(match[1], tr.value(registers[0]))
    return tr.assign(registers[0], f"*({item} *)(parameters + {tr.offsets[match[1]] + int(match[2] or 0)})")


def copy(tr: Translator, at: int, instruction: Instruction) -> str:
    name, operands = instruction.name, instruction.operands
    if name == "cp.async.commit_group" and not operands:
        return "group[t]++;"
    if name == "cp.async.wait_group" and len(operands) == 1:
        return f"wait_copies({tr.value(operands[0])}, t);"
    if name == "cp.async.wait_all" and not operands:
        return "group[t]++; wait_copies(0, t);"
    if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L2::\w+)?", name) and len(operands) in (3, 4):
        to, source, size = tr.address(operands[0]), tr.address(operands[1]), tr.value(operands[2])
        taken = tr.value(operands[3]) if len(operands) == 4 else size
        return f"copy_async({to}, {source}, {size}, {taken}, {at}, t);"
    raise NotUnderstood(f"unknown copy: {instruction}")
