"""What a piece of work costs: its time, and its memory beside what was there before it."""

from __future__ import annotations

import ctypes
import re
import time
from pathlib import Path
from types import TracebackType

import torch

_PROC = Path("/proc/self")


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """Peak memory of a `with` block, in bytes above what was in use at its start.

    On CUDA, it is what PyTorch's allocator handed out. On a CPU, it is the resident set of the whole process. That is
    exact to a fraction of a MiB (Linux counts pages per processor, and adds them up now and then), and includes what
    other threads allocate and what the C library leaves resident between the block's own tensors: measure a few times.
    Memory from before the block that is freed in it would lower the result: free none there. Blocks do not nest.

    `bytes` is None before the end of the block, and where nothing can be measured: on a CPU, outside Linux.

    >>> with PeakMemory(torch.device("cpu")) as peak:
    ...     _ = torch.ones(1 << 24).exp().sum()    # two tensors of 64 MiB
    >>> peak.bytes is None or 127 < peak.bytes / 2**20 < 132
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        self._device = device
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            _return_free_heap()
            self._start = _resident_peak() if _reset_resident_peak() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start is None:
            return
        end = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident_peak()
        self.bytes = None if end is None else end - self._start


def _return_free_heap() -> None:
    """Gives memory that was freed back to the system.

    glibc keeps freed blocks below a threshold, which it raises up to 32 MiB as larger ones are freed. They stay
    resident, and work that is served from them would seem to take no memory. Other allocators (musl's, or one that is
    preloaded) may do the same; nothing is done about them.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def _reset_resident_peak() -> bool:
    """Lowers the peak to what is resident now; see "clear_refs" in proc(5)."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
