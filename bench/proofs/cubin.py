"""Compile, without a GPU, what a launch asks Triton for, and read what is in the result.

A launch on tensors without memory runs under a driver that only names an architecture, and what it asks Triton to
compile is caught: signature, specialisation and options are Triton's own, not a copy of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel. `spill` counts bytes a thread; `widths` is what `access_widths` returns."""

    BLOCK_N: int
    BLOCK_V: int
    num_warps: int
    registers: int
    spill: int
    shared: int
    widths: dict[str, int] = field(default_factory=dict)
    rows_fastest: bool | None = None


@dataclass
class OfflineDriver:
    """As much of a Triton driver as a launch asks for before it compiles."""

    arch: int

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def requested(launch: Callable[[], Any], arch: int) -> dict[str, tuple[Any, Any]]:
    """By kernel, the (source, options) that `launch()` asks Triton to compile."""
    from triton.compiler import ASTSource
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    caught = {}

    def catch(self, key, signature, device, constexprs, options, attrs, warmup):
        caught[self.fn.__name__] = ASTSource(self, signature, constexprs, attrs), options

    driver.set_active(OfflineDriver(arch))
    with mock.patch.object(JITFunction, "_do_compile", catch):
        launch()
    return caught


def compiled(source: Any, options: Any, arch: int) -> Cubin:
    import triton

    # Thousands of cubins, each looked at once, do not belong in the user's cache.
    with tempfile.TemporaryDirectory() as cache_dir, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache_dir):
        kernel = triton.compile(source, target=OfflineDriver(arch).get_current_target(), options=options.__dict__)
        file = Path(cache_dir, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file]
        usage = subprocess.check_output(command, text=True)
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    parameters = [name for name, kind in source.signature.items() if kind != "constexpr"]
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Cubin(
        BLOCK_N=constants["BLOCK_N"],
        BLOCK_V=constants.get("BLOCK_V", 1),
        num_warps=options.num_warps,
        registers=used["REG"],
        spill=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,
        widths=access_widths(kernel.asm["ptx"], parameters),
        rows_fastest=rows_fastest(kernel.asm["ttgir"]),
    )


def access_widths(ptx: str, parameters: list[str]) -> dict[str, int]:
    """The narrowest access in bytes to every tensor, by "load x_ptr", "store dx_ptr".

    Addresses are followed back to the kernel parameters that they come from. One that depends on a loaded value is
    a gather, such as the target's logit, and left out. What comes from shared memory may be such a value, or a row
    that changed threads, as happens in tiles of several rows: of accesses that depend on it, the widest is taken,
    and only where a tensor has no others.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    accesses: list[tuple[str, int, str]] = []
    latest: dict[str, str] = {}  # within a basic block, the one definition that reaches; else any may
    for number, line in enumerate(ptx.splitlines()):
        if line.startswith("$L__BB"):
            latest.clear()
        opcode, _, operands = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line).partition(" ")
        found = re.findall(r"%r[ds]?\d+|\w+_param_\d+", operands)
        if re.match(r"(ld|st)\.global", opcode):
            lanes, bits = re.search(r"(?:\.v(\d))?\.[bfsu](\d+)", opcode).groups("1")
            address = re.search(r"\[\s*(%\w+)", operands)[1]
            kind = "load" if opcode.startswith("ld") else "store"
            accesses.append((kind, int(lanes) * int(bits) // 8, latest.get(address, address)))
        if not found or not opcode[:1].isalpha() or opcode.startswith(("st.", "setp")):
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
        return {parameters[i] for i in numbers if i < len(parameters)} | (seen & {"global", "shared"})

    sure: dict[str, int] = {}
    unsure: dict[str, int] = {}
    for kind, width, address in accesses:
        origin = origins(address)
        for name in origin if "global" not in origin else ():
            access = f"{kind} {name}"
            if "shared" in origin:
                unsure[access] = max(width, unsure.get(access, 0))
            else:
                sure[access] = min(width, sure.get(access, width))
    return {access: width for access, width in (unsure | sure).items() if access.endswith("_ptr")}


def rows_fastest(ttgir: str) -> bool | None:
    """Whether neighbouring threads access neighbouring rows of a (rows, classes) tile; None without a tile."""
    tile = re.search(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>", ttgir)
    layout = tile and re.search(rf"^{tile[1]} = #ttg\.blocked<.*order = \[(\d), \d\]", ttgir, re.MULTILINE)
    return layout[1] == "0" if layout else None
