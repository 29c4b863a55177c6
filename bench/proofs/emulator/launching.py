"""A Triton driver that runs compiled kernels on CPU tensors.

    with Emulator(90) as emulator:
        kernel[grid](x, out, ...)

Triton compiles the kernel for the architecture, as it would for a GPU, and the emulator runs what comes out of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from ..launcher import SCRATCH, flat
from ..null_driver import Loaded, NullDriver
from .building import LOCKSTEP, ORDERS, Compiled
from .faults import KernelFault
from .tensors import Memory

#: Bytes of shared memory of a multiprocessor, by architecture: "Technical specifications per compute capability" in the
#: CUDA programming guide.
SHARED = {75: 64 << 10, 80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}

#: Bytes of a launch's tensors above which it runs once, as every order takes a copy.
LARGE = 1 << 26

_ONE_AT_A_TIME = threading.Lock()


class EmulatingLauncher:
    """Takes the place of the object by which Triton launches a kernel on a GPU."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.runtime.driver import driver

        self.driver: Any = driver.active
        self.name, self.signature, self.metadata = source.fn.__name__, tuple(source.signature.values()), metadata
        self.compiled: Compiled | None = None

    def __call__(self, x: int, y: int, z: int, stream: int, loaded: Loaded, *arguments: Any) -> None:
        passed = arguments[-len(self.signature) :]
        with _ONE_AT_A_TIME:
            if self.compiled is None:
                path = next(path for name, path in loaded.files.items() if name.endswith(".ptx"))
                self.compiled = Compiled(path.read_text(), self.metadata.shared, Path(path).parent)
            packed = [*flat(self.signature, passed), *[b"\0" * 8] * SCRATCH]
            memory = Memory(passed, self.driver.by_element)
            self.driver.launched(self.compiled, (x, y, z), packed, memory)


class Emulator(NullDriver):
    """A context in which Triton's kernels run on the CPU, compiled for an architecture.

    Args:
        arch: 90 for sm_90.
        all_orders: whether to run every launch in each of three orders of warps and programs, and to compare the
            results, unless the tensors are larger than LARGE. Otherwise, all threads of a program run in lockstep.
        assembled: whether Triton also runs the assembler, and kernels lie in its own cache.
        errors: how far approximate instructions are off, as a share of what the PTX manual allows.
        by_element: whether to keep the memory of every launch in `moved`, which then tells how often each element was
            read and written.
    """

    launcher_cls = EmulatingLauncher

    def __init__(
        self,
        arch: int,
        *,
        all_orders: bool = False,
        assembled: bool = False,
        errors: float = 1.0,
        by_element: bool = False,
    ) -> None:
        super().__init__("cuda", arch)
        self.all_orders, self.assembled, self.errors = all_orders, assembled, errors
        self.by_element = by_element
        self.kernels: dict[str, list[Compiled]] = {}
        self.moved: list[tuple[str, Memory]] = []  # by launch, (kernel, memory)

    def __enter__(self) -> Emulator:
        """Without the assembler, compiling takes a fifth less time; what is compiled then has a folder of its own."""
        from triton import knobs
        from triton.backends.nvidia.compiler import CUDABackend

        super().__enter__()
        self._stack = ExitStack()
        if self.assembled:
            return self
        self._stack.enter_context(knobs.cache.scope())
        knobs.cache.dir = str(Path(knobs.cache.dir, "emulated"))
        no_assembler = mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode())
        self._stack.enter_context(no_assembler)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        super().__exit__(*exception)

    def launched(self, compiled: Compiled, grid: tuple[int, int, int], packed: list[bytes], memory: Memory) -> None:
        known = self.kernels.setdefault(compiled.name, [])
        if compiled not in known:
            known.append(compiled)
        if self.by_element:
            self.moved.append((compiled.name, memory))
        if not self.all_orders or sum(block.end - block.start for block in memory.blocks) > LARGE:
            compiled.run(grid, packed, memory, LOCKSTEP, self.errors)
            return
        before, results = memory.contents(), []
        for order in ORDERS:
            memory.restore(before)
            memory.forget()
            compiled.run(grid, packed, memory, order, self.errors)
            results.append(memory.contents())
        if any(result != results[0] for result in results):
            raise KernelFault(f"{compiled.name}: the results depend on the order in which warps and programs run")


@contextlib.contextmanager
def emulated(arch: int, **options: Any) -> Iterator[Emulator]:
    """The emulator, with `backend="triton"` of this package on CPU tensors, as on a chip of this architecture."""
    from fused_ignore_ce.backends import choice
    from fused_ignore_ce.kernels import chip, cross_entropy

    shared = SHARED[arch] if arch >= chip.COPIES_ASYNC else 0
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(chip, "EMULATED", replace(chip.EMULATED, arch=arch, shared_bytes=shared)))
        stack.enter_context(mock.patch.object(choice, "_triton", return_value=cross_entropy))
        chip.chip_of.cache_clear()
        stack.callback(chip.chip_of.cache_clear)
        yield stack.enter_context(Emulator(arch, **options))
