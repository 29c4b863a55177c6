"""What a launch has to know of a device."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from triton import knobs

from .tables import ARITHMETIC, TABLES, Table


@dataclass(frozen=True)
class Chip:
    """The properties of a device that a launch depends on."""

    arch: int | str
    multiprocessors: int
    l2_bytes: int = 50 << 20
    threads: int = 2048  # of a multiprocessor
    warp_size: int = 32
    table: Table = ARITHMETIC
    shared_bytes: int = 0  # of a multiprocessor, where a kernel can keep a row in it

    @property
    def is_nvidia(self) -> bool:
        return isinstance(self.arch, int)

    def options(self, registers: int) -> dict[str, int]:
        """The launch options that only this kind of chip has."""
        return {"maxnreg": registers} if self.is_nvidia else {}


#: The interpreter runs what this chip would run.
INTERPRETED = Chip(arch=90, multiprocessors=132)

#: Compiled kernels that are executed on CPU tensors are those of this chip.
EMULATED = Chip(arch=90, multiprocessors=132, shared_bytes=228 << 10)

#: The first architecture that copies from device to shared memory without registers.
COPIES_ASYNC = 80


@lru_cache
def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return INTERPRETED if knobs.runtime.interpret else EMULATED
    of = torch.cuda.get_device_properties(device)
    arch = of.major * 10 + of.minor
    if torch.version.hip:
        arch, _, _ = of.gcnArchName.partition(":")
    return Chip(
        arch,
        of.multi_processor_count,
        of.L2_cache_size,
        of.max_threads_per_multi_processor,
        of.warp_size,
        TABLES.get(of.name, ARITHMETIC),
        of.shared_memory_per_multiprocessor if isinstance(arch, int) and arch >= COPIES_ASYNC else 0,
    )
