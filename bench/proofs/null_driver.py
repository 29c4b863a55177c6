"""A Triton driver that compiles kernels and launches nothing, so that real launchers run where no GPU is.

    with NullDriver("cuda", 90) as driver:
        launcher(torch.empty(8192, 32000, dtype=torch.bfloat16, device="meta"))
    for kernel, grid in driver.launches:
        print(kernel.name, grid, kernel.metadata.num_warps, len(kernel.binary))

Triton asks a tensor only for its address and dtype, so tensors without memory (device "meta") and CPU tensors will do.
Triton itself decides what is compiled (signature, specialisation, options).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as active_driver

#: Triton keeps compiled kernels by device number. Every driver has a number of its own, for which there are none yet.
_NUMBERS = itertools.count(1)

#: What Triton asks a device for before it loads a kernel. No GPU has more shared memory per program.
PROPERTIES = {"max_shared_mem": 227 * 1024}


@dataclass
class Kernel:
    """A compiled kernel."""

    name: str
    signature: dict[str, Any]  # type by parameter; "constexpr" for those that were compiled in
    constants: dict[str, Any]  # by parameter; includes arguments that Triton specialised on, such as a stride of 1
    metadata: Any  # Triton's: num_warps, shared, target, ...
    binary: bytes = b""  # cubin or hsaco
    files: dict[str, Path] = field(default_factory=dict)  # every stage of the compilation, by file name

    @property
    def parameters(self) -> list[str]:
        """The names of the compiled function's arguments, in order. A tuple's elements are "rows_out.loss" etc."""
        return [name for name, kind in _flat(self.signature.items()) if kind != "constexpr"]

    @property
    def pointers(self) -> list[str | None]:
        """The same, with None in place of arguments that are not pointers."""
        kinds = [(name, kind) for name, kind in _flat(self.signature.items()) if kind != "constexpr"]
        return [name if kind.startswith("*") else None for name, kind in kinds]

    def stage(self, suffix: str) -> str:
        """A stage of the compilation as text: "ttgir", "ptx", "amdgcn"."""
        return next(path for name, path in self.files.items() if name.endswith(f".{suffix}")).read_text()


def _flat(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, kind in items:
        if isinstance(kind, tuple):
            names = getattr(kind, "_fields", range(len(kind)))
            yield from _flat((f"{name}.{part}", inner) for part, inner in zip(names, kind, strict=True))
        else:
            yield name, kind


class NullLauncher:
    """Takes the place of the object by which Triton launches a kernel on a GPU."""

    def __init__(self, source: Any, metadata: Any) -> None:
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        self.kernel = Kernel(source.fn.__name__, dict(source.signature), constants, metadata)
        self.launches = active_driver.active.launches

    def __call__(self, x: int, y: int, z: int, stream: int, loaded: Loaded, *arguments: Any) -> None:
        if not self.kernel.binary:
            self.kernel.binary, self.kernel.files = loaded.binary, loaded.files
        self.launches.append((self.kernel, (x, y, z)))


@dataclass
class Loaded:
    """Stands for the handle of a function on a device."""

    binary: bytes
    files: dict[str, Path] = field(default_factory=dict)


def configuration(function: Any, request: dict[str, Any]) -> str:
    """What Triton is asked to compile, as text, without numbers of rows, programs and the like.

    Triton also specialises on such numbers where they are 1 or multiples of 16, and so compiles many kernels that
    differ by an instruction or two outside of their loops. The only numbers that change loops are the number of classes
    and the strides of tensors.
    """
    kept = []
    for index, parameter in enumerate(function.params):
        kind = request["signature"][parameter.name]
        kinds = dict(_flat([(parameter.name, kind)])).values()
        values = {path[1:]: value for path, value in request["constants"].items() if path[0] == index}
        counts = all(k.startswith(("i", "u")) or (k == "constexpr" and 1 in values.values()) for k in kinds)
        if parameter.is_constexpr or parameter.name == "V" or parameter.name.startswith("stride") or not counts:
            # The strides of a parameter belong to one tensor. If one of them is not aligned, the tensor's rows are not.
            attributes = [value for path, value in request["configs"][0].items() if path[0] == index]
            kept.append(f"{parameter.name}: {kind} {values} {'aligned' if all(attributes) else ''}")
    options = {name: request[name] for name in ("num_warps", "num_stages")}
    return f"{function.__name__}({', '.join(kept)}) {options}"


class NullUtils:
    """The part of a driver that talks to the device."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, Loaded, int, int, int]:
        """(module, function, registers, spills, most threads). Nothing reads these registers and spills.

        A module that is not None tells Triton that the kernel is loaded. Otherwise, it would load it at every launch.
        """
        return self, Loaded(binary), 0, 0, 1024


class NullDriver(DriverBase):
    """A context in which Triton compiles for one architecture. `launches` has (kernel, grid) of every launch.

    Args:
        backend: "cuda" or "hip".
        arch: 90 for sm_90, or "gfx942".
        select: tells from a request's `configuration` whether to compile it. Others are only listed in `requests`, and
            not launched.
    """

    launcher_cls: type[Any] = NullLauncher

    def __init__(self, backend: str, arch: int | str, select: Callable[[str], bool] | None = None) -> None:
        self.target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        self.select = select
        self.utils = NullUtils()
        self.launches: list[tuple[Kernel, tuple[int, int, int]]] = []
        self.requests: list[str] = []
        self._number = next(_NUMBERS)
        self._outer: tuple[Any, Any] | None = None

    def __enter__(self) -> NullDriver:
        if knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: Triton would interpret kernels and compile none. Unset it.")
        # Reads the private attribute: `active` would look for a GPU, and raise where there is none.
        self._outer = active_driver._active, knobs.runtime.jit_cache_hook
        active_driver.set_active(self)
        knobs.runtime.jit_cache_hook = self._requested
        knobs.runtime.kernel_load_end_hook.add(self._loaded)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._outer is not None
        active_driver._active, knobs.runtime.jit_cache_hook = self._outer
        knobs.runtime.kernel_load_end_hook.remove(self._loaded)

    def _requested(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton calls this before it compiles. True tells Triton not to."""
        request = configuration(fn.jit_function, compile)
        self.requests.append(request)
        return self.select is not None and not self.select(request)

    @staticmethod
    def _loaded(module: object, function: Loaded, name: str, files: dict[str, str], hash: str) -> None:
        function.files = {file: Path(path) for file, path in files.items()}

    @staticmethod
    def is_active() -> bool:
        """Triton never chooses this driver by itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("Nothing is launched, so no type is passed.")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("Nothing is launched, so nothing can be timed.")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self._number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu
