"""GPUs as data: what a prediction needs to know about them."""

from __future__ import annotations

from dataclasses import dataclass

KB, MB = 2**10, 2**20


@dataclass(frozen=True)
class Chip:
    """One GPU. Bandwidth and clock are the vendor's; a real kernel reaches a little less of either."""

    name: str
    arch: int
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # boost, in cycles a second
    l2: int  # bytes
    threads: int  # the most that are resident on one multiprocessor
    programs: int  # the most that are resident on one multiprocessor
    shared: int  # bytes of one multiprocessor
    source: str
    registers: int = 65536  # of one multiprocessor
    issue_slots: int = 4  # warp instructions that a multiprocessor issues per cycle
    special_units: int = 16  # special-function operations that a multiprocessor executes per cycle
    warp_size: int = 32


#: Resident threads, programs, shared memory, registers and the rate of special functions are in the tables "Technical
#: specifications per compute capability" and "Throughput of native arithmetic instructions" of the CUDA C++
#: programming guide.
CHIPS = (
    Chip("A100", 80, 2.039e12, 108, 1.410e9, 40 * MB, 2048, 32, 164 * KB, "A100 80GB SXM data sheet; A100 whitepaper"),
    Chip("H100", 90, 3.35e12, 132, 1.755e9, 50 * MB, 2048, 32, 228 * KB, "H100 SXM data sheet; H100 whitepaper"),
    Chip("H200", 90, 4.8e12, 132, 1.755e9, 50 * MB, 2048, 32, 228 * KB, "H200 data sheet; H100 whitepaper"),
    Chip("B200", 100, 8.0e12, 148, 1.850e9, 126 * MB, 2048, 32, 228 * KB, "DGX B200 data sheet; device properties"),
    Chip("L40S", 89, 0.864e12, 142, 2.520e9, 96 * MB, 1536, 24, 100 * KB, "L40S data sheet; Ada whitepaper"),
    Chip("RTX 4090", 89, 1.008e12, 128, 2.520e9, 72 * MB, 1536, 24, 100 * KB, "Ada whitepaper"),
)


def chip(name: str) -> Chip:
    return next(chip for chip in CHIPS if chip.name == name)


def of_arch(arch: int | str) -> Chip:
    """The first chip of an architecture."""
    return next(chip for chip in CHIPS if chip.arch == arch)


def resident_programs(chip: Chip, registers: int, threads: int, shared: int) -> int:
    """Programs of a kernel that a multiprocessor holds at once."""
    warps = -(-threads // chip.warp_size)
    # A warp gets its registers in units of 256, from one of four equal register files.
    warp_registers = -(-registers * chip.warp_size // 256) * 256
    by_registers = 4 * (chip.registers // 4 // warp_registers) // warps
    # A program's shared memory is rounded up to 128 bytes, and the system reserves 1 KiB per program.
    shared_bytes = -(-shared // 128) * 128 + KB
    return min(by_registers, chip.threads // (warps * chip.warp_size), chip.shared // shared_bytes, chip.programs)
