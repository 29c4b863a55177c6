"""Compiles a translated kernel with the C compiler, which Triton needs anyway, and calls it.

The library lies beside what Triton has cached of the kernel, so that it is built once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import ptx
from .faults import Failure, message
from .tensors import Block, Memory
from .translating import HERE, Translation, translate

#: Compiling takes longer than running, so there is little optimisation. No option may let the compiler change a result,
#: as by fusing a product and a sum.
OPTIONS = ["-Og", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off"]


@functools.cache
def options() -> list[str]:
    """The compiler's options on this machine: its fused multiply-add, where it has one, is a single instruction."""
    cpu = Path("/proc/cpuinfo")
    fma = platform.machine() in ("x86_64", "AMD64") and cpu.exists() and " fma " in cpu.read_text()
    return [*OPTIONS, *(["-mfma"] if fma else [])]


@functools.cache
def _headers() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")))


class Compiled:
    """A kernel that runs on the CPU."""

    def __init__(self, text: str, shared: int, folder: Path) -> None:
        self.translation: Translation = translate(ptx.read(text), shared)
        self.library: Any = ctypes.CDLL(str(_built(self.translation, folder)))
        #: What was counted before: another object may have run the same library in this process.
        self._before: dict[str, list[int]] = {}
        self.library.launch.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 3 + [ctypes.c_double]
        #: Bytes read and written in the memory that starts at an address, by all launches.
        self.moved: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2, dtype=np.int64))
        for name in ("where", "threads_counted", "warps_counted", "memory_counted"):
            getattr(self.library, name).restype = ctypes.c_void_p
        for name, number in self._counters().items():
            self._before[name] = self._counted(name, number)

    def _counters(self) -> dict[str, int]:
        """How many numbers each function of the library counts."""
        segments = len(self.translation.segments)
        return {"threads_counted": segments, "warps_counted": segments, "memory_counted": 8}

    def _counted(self, function: str, number: int) -> list[int]:
        return list((ctypes.c_uint64 * number).from_address(getattr(self.library, function)()))

    def run(
        self, grid: tuple[int, int, int], arguments: list[bytes], memory: Memory, order: Order, errors: float
    ) -> None:
        """Runs all programs of a launch; raises what a check of the emulator found."""
        offsets = list(self.translation.offsets.values())
        if len(arguments) != len(offsets):
            raise AssertionError(f"{self.name}: expected {len(offsets)} parameters, the launcher has {len(arguments)}")
        packed = bytearray(max(offsets, default=0) + 8)
        for offset, value in zip(offsets, arguments, strict=True):
            packed[offset : offset + len(value)] = value
        buffer = (ctypes.c_char * len(packed)).from_buffer(packed)
        blocks = (Block * max(len(memory.blocks), 1))(*memory.blocks)
        failed = self.library.launch(
            (ctypes.c_uint32 * 3)(*grid), buffer, blocks, len(memory.blocks), *order, errors
        )  # fmt: skip
        for block in blocks[: len(memory.blocks)]:
            self.moved[block.start] += (block.read, block.written)
        if failed:
            failure = Failure.from_address(self.library.where())
            raise message(self.name, failure, self.translation, memory)

    @property
    def name(self) -> str:
        return self.translation.function.name

    def counts(self) -> Counts:
        """What all launches so far have executed."""
        segments = self.translation.segments
        counted = {
            name: [now - before for now, before in zip(self._counted(name, number), self._before[name], strict=True)]
            for name, number in self._counters().items()
        }
        by_name: list[Counter[str]] = []
        for function in ("threads_counted", "warps_counted"):
            total: Counter[str] = Counter()
            for times, instructions in zip(counted[function], segments, strict=True):
                for number in instructions:
                    total[self.translation.instructions[number].name] += times
            by_name.append(total)
        threads, warps = by_name
        *device, parts, wavefronts = counted["memory_counted"]
        return Counts(threads, warps, Moved(*device[::2]), Moved(*device[1::2]), parts, wavefronts)


class Moved(NamedTuple):
    """What threads read, or wrote, in device memory."""

    bytes: int  # those that several threads read count for each
    requests: int  # instructions of warps of which some thread accesses memory
    sectors: int  # of 32 bytes, for each request those that it touches


class Counts(NamedTuple):
    """What launches have executed. Instructions are counted by name, whether or not their guards held."""

    threads: Counter[str]
    warps: Counter[str]
    read: Moved
    written: Moved
    shared_parts: int  # of the requests of shared memory, each of up to 128 bytes
    shared_wavefronts: int  # which these take

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts that would not be if all words of a part lay in different banks."""
        return self.shared_wavefronts - self.shared_parts


#: (whether each warp runs alone up to a barrier, whether warps and programs run from the last to the first).
Order = tuple[bool, bool]
LOCKSTEP, FORWARDS, BACKWARDS = (False, False), (True, False), (True, True)
ORDERS: tuple[Order, ...] = (LOCKSTEP, FORWARDS, BACKWARDS)


def _built(translation: Translation, folder: Path) -> Path:
    command = [os.environ.get("CC", "cc"), *options(), f"-I{HERE}"]
    key = hashlib.sha256(translation.source.encode() + _headers() + " ".join(command).encode()).hexdigest()[:16]
    library = folder / f"{translation.function.name}.{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, built = Path(scratch, "kernel.c"), Path(scratch, "kernel.so")
            source.write_text(translation.source)
            run = subprocess.run([*command, "-o", str(built), str(source), "-lm"], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{command[0]} does not compile {translation.function.name}: {run.stderr[:2000]}")
            os.replace(built, library)  # another process may build the same one
    return library
