"""What the emulator says when a check fails."""

from __future__ import annotations

import ctypes

from .tensors import Memory, hull
from .translating import Translation


class KernelFault(RuntimeError):
    """A kernel did what no kernel may do."""


class DeviceAssertion(KernelFault):
    """A `tl.device_assert` of a kernel failed."""


class Failure(ctypes.Structure):
    """The first fault of a launch, as `memory.h` keeps it."""

    _fields_ = (
        ("fault", ctypes.c_int32),
        ("instruction", ctypes.c_int32),
        ("thread", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("program", ctypes.c_int32 * 3),
        ("bytes", ctypes.c_int32),
        ("address", ctypes.c_uint64),
        ("message", ctypes.c_uint64),
    )


#: In the order of `enum Fault`.
MEANINGS = (
    "",
    "an access of {bytes} bytes that is outside of every tensor passed{nearest}",
    "an access of {bytes} bytes whose address is no multiple of that{nearest}",
    "a race in shared memory with thread {other}: no barrier between two accesses, one of which writes",
    "a race with thread {other}, which stores another value there: no barrier between the two{nearest}",
    "a race with program {other}, which reads or writes the same memory of a tensor{nearest}",
    "the assertion failed: {message}",
    "a trap",
    "threads of a warp have to meet here, and some are elsewhere",
    "threads of a program wait at different barriers",
    "more copies in flight than the emulator has room for",
)


def message(kernel: str, failure: Failure, translation: Translation, memory: Memory) -> KernelFault:
    instruction = translation.instructions[failure.instruction]
    text = ctypes.string_at(failure.message).decode() if failure.message else ""
    meaning = MEANINGS[failure.fault].format(
        bytes=failure.bytes, other=failure.other, message=text, nearest=_nearest(failure.address, memory)
    )
    where = f"program {tuple(failure.program)}, thread {failure.thread}"
    kind = DeviceAssertion if text else KernelFault
    return kind(f"{kernel}, {instruction.source}, {where}: {meaning}. The instruction is `{instruction}`.")


def _nearest(address: int, memory: Memory) -> str:
    """The passed tensor that an address is in or nearest to, in words."""

    def distance(start: int, size: int) -> int:
        return max(start - address, address - start - size + 1, 0)

    if not address or not memory.tensors:
        return ""
    near = min(memory.tensors, key=lambda tensor: distance(tensor.data_ptr(), hull(tensor)))
    shape = "x".join(map(str, near.shape)) or "scalar"
    return f" ({address - near.data_ptr()} bytes after the first element of a {shape} {near.dtype} tensor)"
