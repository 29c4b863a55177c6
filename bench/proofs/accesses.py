"""How wide a kernel's accesses to each of its tensors are, and how a warp's accesses lie over the rows of a tile."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from math import prod


def access_widths(ptx: str, pointers: list[str | None], several_rows: bool = False) -> dict[str, int]:
    """The width in bytes of the narrowest access to every tensor, by "load logits.x", "store gradients.dx".

    `pointers` has the names of the kernel's parameters, None for those that are not pointers.

    Addresses are followed back to the kernel parameters that they come from. An address that depends on a loaded value,
    or was selected by one, is that of a gather, such as the load of the target's logit. Gathers are left out.

    An address that comes from shared memory may be a gather's, or that of a row that changed threads, as happens in
    tiles of several rows. Such accesses count only where a tensor has no others, and then the widest is taken.

    With `several_rows`, the widest of all accesses is taken: if one tile covers its rows completely, the class that is
    looked up again for the argmax does not depend on a loaded value, so that this gather cannot be told from others.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    accesses: list[tuple[str, int, str]] = []
    latest: dict[str, str] = {}  # the only definition that reaches within a basic block; without it, any may
    for number, line in enumerate(ptx.splitlines()):
        if line.startswith("$L__BB"):
            latest.clear()
        opcode, _, operands = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line).partition(" ")
        found = re.findall(r"%(?:r[ds]?|p)\d+|\w+_param_\d+", operands)
        if re.match(r"(ld|st)\.global", opcode):
            [(lanes, bits)] = re.findall(r"(?:\.v(\d))?\.[bfsu](\d+)$", opcode)
            [address] = re.findall(r"\[\s*(%\w+)", operands)
            kind = "load" if opcode.startswith("ld") else "store"
            accesses.append((kind, int(lanes or 1) * int(bits) // 8, latest.get(address, address)))
        if not found or not opcode[:1].isalpha() or opcode.startswith("st."):
            continue
        written = operands.split("}")[0].count("%") if operands.strip().startswith("{") else 1
        used = {latest.get(name, name) for name in found[written:]}
        for register in found[:written]:
            latest[register] = f"{register}@{number}"
            sources[register].add(latest[register])
            memory = re.match(r"ld\.(global|shared)", opcode)
            sources[latest[register]] = {memory[1]} if memory else used

    @cache
    def origins(register: str) -> set[str]:
        seen: set[str] = set()
        pending = [register]
        while pending:
            new = sources[pending.pop()] - seen
            seen |= new
            pending += new
        numbers = {int(name.rsplit("_", 1)[1]) for name in seen if "_param_" in name}
        found = {pointers[i] for i in numbers if i < len(pointers)}
        return {name for name in found if name} | (seen & {"global", "shared"})

    sure: dict[str, int] = {}
    unsure: dict[str, int] = {}
    for kind, width, address in accesses:
        origin = origins(address)
        for name in origin - {"shared"} if "global" not in origin else ():
            access = f"{kind} {name}"
            if "shared" in origin or several_rows:
                unsure[access] = max(width, unsure.get(access, 0))
            else:
                sure[access] = min(width, sure.get(access, width))
    return unsure | sure


def rows_together(ttgir: str) -> bool | None:
    """Whether a warp accesses all rows of a tile (its first dimension) or 32 of them at once; None without a tile."""
    loads = re.findall(r"tt\.load .*: tensor<((?:\d+x)+)!tt\.ptr<\w+>, (#\w+)>", ttgir)
    tiles = [(shape.split("x")[:-1], layout) for shape, layout in loads]
    tiles = [(shape, layout) for shape, layout in tiles if sum(n != "1" for n in shape) > 1]
    if not tiles:
        return None
    shape, layout = tiles[0]
    line = re.search(rf"^{re.escape(layout)} = #ttg\.blocked<.*", ttgir, re.MULTILINE)
    if line is None:
        return None
    # A thread may have several neighbouring rows.
    rows = [int(n) for n in re.findall(r"(?:sizePerThread|threadsPerWarp) = \[(\d+)", line[0])]
    return prod(rows) >= min(int(shape[0]), 32)
