"""Translates instructions by which the threads of a warp meet: shuffles, reductions, matrices, barriers of a warp."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .ptx import Instruction, NotUnderstood

if TYPE_CHECKING:
    from .translating import Translator

_NAMES = ("shfl.sync", "redux.sync", "bar.warp.sync", "stmatrix.sync", "ldmatrix.sync", "vote.sync")

_REDUCTIONS = {
    "add": "x + y", "min": "x < y ? x : y", "max": "x > y ? x : y", "and": "x & y", "or": "x | y", "xor": "x ^ y",
}  # fmt: skip


def is_synchronising(instruction: Instruction) -> bool:
    return instruction.name.startswith(_NAMES)


def synchronised(translator: Translator, segment: int, at: int, instruction: Instruction) -> list[str]:
    """The body of a segment that is one such instruction, for every warp of a group."""
    if instruction.guard:
        raise NotUnderstood(f"threads that meet under a condition: {instruction}")
    named, body = _body(translator, at, instruction)
    return [
        f"int progressed = 0; for (int warp = from; warp < to; warp += 32) {{ u32 there = present({segment}, warp);",
        "if (!there) continue;",
        f"{{ int t = warp + __builtin_ctz(there); (void)t; if (~there & {named}) continue; }}",
        *body,
        f"threads_run[{segment}] += __builtin_popcount(there); warps_run[{segment}]++; progressed = 1;",
        f"if (diverged) for (int t = warp; t < warp + 32; t++) if (there >> t % 32 & 1) at[t] = {segment + 1}; }}",
        f"progress = progressed; return diverged || !progressed ? -1 : {segment + 1}; }}",
    ]


LANES = "for (int lane = 0, t = warp; lane < 32; lane++, t++) if (there >> lane & 1)"


def _body(tr: Translator, at: int, instruction: Instruction) -> tuple[str, list[str]]:
    """(the mask of lanes that have to be there, the statements)."""
    name, operands = instruction.name, instruction.operands

    def read(text: str) -> str:
        """An operand; a register is in its array."""
        return f"registers.{tr.value(text)}[t]" if tr.is_register(text) else tr.value(text)

    def write(register: str, value: str) -> str:
        return f"registers.{tr.value(register)}[t] = {value};" if register in tr.kept else ";"

    if name == "bar.warp.sync" and len(operands) == 1:
        return f"(u32){read(operands[0])}", ["warp_epoch[warp / 32]++;"]
    if (match := re.fullmatch(r"shfl\.sync\.(bfly|up|down|idx)\.b32", name)) and len(operands) == 5:
        result, a, b, c, mask = operands
        results = result.split("|")
        valid = write(results[1], "valid") if len(results) == 2 else ""
        return f"(u32){read(mask)}", [
            "u32 values[32];",
            f"{LANES} values[lane] = {read(a)};",
            f"{LANES} {{ int valid, lane_read = source_lane({match[1]}, lane, {read(b)}, {read(c)}, &valid);",
            f"if (!(there >> lane_read & 1)) fail(WARP_DIVERGED, {at}, t, there, 0, 0);",
            f"{write(results[0], 'values[lane_read]')} {valid} }}",
        ]
    if (match := re.fullmatch(r"redux\.sync\.(\w+)\.([sub]32)", name)) and len(operands) == 3:
        result, a, mask = operands
        return f"(u32){read(mask)}", [
            f"{match[2]} x = 0; int begun = 0;",
            f"{LANES} {{ {match[2]} y = {read(a)}; x = begun++ ? ({_REDUCTIONS[match[1]]}) : y; }}",
            f"{LANES} {write(result, 'x')}",
        ]
    if (match := re.fullmatch(r"redux\.sync\.(min|max)(\.abs)?(\.NaN)?\.f32", name)) and len(operands) == 3:
        result, a, mask = operands
        value = f"from_f32({read(a)}{' & 0x7fffffff' if match[2] else ''})"
        function = f"{match[1]}_{'nan_' if match[3] else ''}f32"
        return f"(u32){read(mask)}", [
            "float x = 0; int begun = 0;",
            f"{LANES} {{ float y = {value}; x = begun++ ? {function}(x, y) : y; }}",
            f"{LANES} {write(result, 'to_f32(x)')}",
        ]
    match = re.fullmatch(r"(st|ld)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", name)
    if match and len(operands) == 2:
        store = match[1] == "st"
        place, values = operands if store else operands[::-1]
        registers = values.strip("{}").split(",")
        base, _, offset = place.strip("[]").partition("+")
        lines = ["u32 addresses[32];", f"{LANES} addresses[lane] = {read(base)} + {offset or 0};"]
        for matrix, register in enumerate(registers):
            lines.append("calls++;")  # a matrix is a request by itself
            where = f"matrix_address(addresses, {matrix}, lane, half, {int(bool(match[3]))})"
            if store:
                move = f"u16 value = {read(register)} >> 16 * half; store_shared({where}, &value, 2, {at}, t);"
                lines.append(f"{LANES} for (int half = 0; half < 2; half++) {{ {move} }}")
            else:
                move = f"word |= (u32)*(const u16 *)load_shared({where}, 2, {at}, t) << 16 * half;"
                lines.append(f"{LANES} {{ u32 word = 0; for (int half = 0; half < 2; half++) {move}")
                lines.append(f"{write(register, 'word')} }}")
        return "FULL", lines
    raise NotUnderstood(f"unknown instruction, or one with another number of operands: {instruction}")
