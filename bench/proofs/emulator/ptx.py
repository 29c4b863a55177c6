"""Reads a kernel from PTX, the assembly language in which Triton gives a kernel to NVIDIA's assembler.

Nothing is left out in silence: a line that is neither an instruction nor a declaration that is known is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class NotUnderstood(ValueError):
    """The emulator does not know this PTX. It has to learn it before it can say anything of the kernel."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, such as `@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];`."""

    name: str  # ld.global.v2.b32
    operands: tuple[str, ...]  # {%r1, %r2} and [%rd1+8]
    guard: str = ""  # the predicate that has to hold: "%p1", or "!%p1"; empty for none
    source: str = ""  # the line of Python that it comes from: /a/path/forward.py:23

    def __str__(self) -> str:
        return f"{f'@{self.guard} ' if self.guard else ''}{self.name} {', '.join(self.operands)}"


@dataclass
class Function:
    """A kernel. A block is a sequence of instructions that is entered at its beginning only."""

    name: str = ""
    parameters: dict[str, str] = field(default_factory=dict)  # type by name, in order
    threads: int = 0  # of a program
    shared: dict[str, int] = field(default_factory=dict)  # bytes by name; 0 for what the launch decides
    constants: dict[str, bytes] = field(default_factory=dict)  # texts of assertions and the like
    registers: dict[str, str] = field(default_factory=dict)  # type by prefix: {"%r": "b32"}
    blocks: list[tuple[str, list[Instruction]]] = field(default_factory=list)  # (label or "", instructions)


_GUARDED = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTERS = re.compile(r"\.reg \.(\w+) (%?\w+)(?:<\d+>)?")
_CONSTANT = re.compile(r"(?:\.visible )?\.(?:global|const) \.align \d+ \.b8 ([\w$]+)\[(\d+)\](?: = \{(.*)\})?")
_SHARED = re.compile(r"(?:\.extern |\.visible )?\.shared \.align \d+ \.b8 ([\w$]+)\[(\d*)\]")
_PARAMETER = re.compile(r"\.param \.(\w+)(?: \.ptr)?(?: \.\w+)?(?: \.align \d+)? (\w+)")
#: Directives that say nothing about what a kernel computes.
_IGNORED = ("version", "target", "address_size", "extern .func", "maxnreg", "minnctapersm", "pragma", "local .align 1 ")


def read(text: str) -> Function:
    """The only kernel of a module."""
    found = Function()
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "(.*?)"', text, re.MULTILINE))
    text = re.split(r"^\s*\.(?:section|file)\b", text, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"\.extern \.func.*?;", "", text, flags=re.DOTALL)  # declares __assertfail
    entry = re.search(r"\.entry (\w+)\s*\((.*?)\)", text, re.DOTALL)
    if entry is None or text.count(".entry") != 1:
        raise NotUnderstood(f"expected a module with one kernel, got {text.count('.entry')} of them")
    found.name = entry[1]
    found.parameters = {name: kind for kind, name in _PARAMETER.findall(entry[2])}
    before, after = text[: entry.start()].rsplit(".visible", 1)[0], text[entry.end() :]
    directives, body = after.split("{", 1)
    for line in [*_statements(before), *directives.splitlines()]:
        _declare(line.strip(), found)
    if not found.threads:
        raise NotUnderstood(f"{found.name} does not say how many threads it has")
    found.blocks.append(("", []))
    source = ""
    for statement in _statements(body[: body.rindex("}")]):
        while match := re.match(r"([$\w]+):\s*", statement):
            if not match[1].startswith(("$L__tmp", "$L__func")):
                found.blocks.append((match[1], []))
            statement = statement[match.end() :].lstrip("{} ")
        if match := re.match(r"\.loc\s+(\d+) (\d+)", statement):
            source = f"{files.get(match[1], '?')}:{match[2]}"
        elif statement.startswith("."):
            _declare(statement, found)
        elif statement:
            match = _GUARDED.fullmatch(statement)
            if match is None:
                raise NotUnderstood(f"an unknown statement in {found.name}: {statement}")
            guard, name, operands = match.groups()
            found.blocks[-1][1].append(Instruction(name, _operands(operands), guard or "", source))
    return found


def _statements(text: str) -> list[str]:
    """Statements end with a semicolon, directives that give the source with the line."""
    text = re.sub(r"^\s*(\.loc.*)$", r"\1;", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.(version|target|address_size).*$", "", text, flags=re.MULTILINE)
    # Braces around a call, and around inline assembly with registers of its own, are of no meaning here.
    return [" ".join(statement.split()).lstrip("{} ") for statement in text.split(";")]


def _declare(line: str, found: Function) -> None:
    if match := re.match(r"\.reqntid (\d+)(?:, 1, 1)?$", line):
        found.threads = int(match[1])
    elif match := _REGISTERS.fullmatch(line):
        found.registers[match[2]] = match[1]
    elif match := _CONSTANT.fullmatch(line):
        values = [int(value) for value in (match[3] or "").split(",") if value.strip()]
        found.constants[match[1]] = bytes(values).ljust(int(match[2]), b"\0")
    elif match := _SHARED.fullmatch(line):
        found.shared[match[1]] = int(match[2] or 0)
    elif line.startswith(".param ."):  # the arguments of a call
        found.registers[line.split()[-1]] = line.split()[1][1:]
    elif line and not line.startswith(tuple(f".{name}" for name in _IGNORED)):
        raise NotUnderstood(f"an unknown declaration in {found.name}: {line}")


def _operands(text: str) -> tuple[str, ...]:
    """The operands, split at commas outside of braces and brackets."""
    parts, depth, last = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[last:at])
            last = at + 1
    return tuple("".join(part.split()) for part in [*parts, text[last:]] if part.strip())
