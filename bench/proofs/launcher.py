"""Runs Triton's own launcher without a GPU, and compares what it would give to a kernel with what was passed to it.

    python -m bench.proofs.launcher

The null driver shows what is compiled. Between a compiled kernel and a launch on a GPU stands Triton's launcher, which
flattens tuples, leaves constants out and packs every argument. Here it runs against a CUDA driver that launches
nothing (`stub_cuda.c`), and every parameter is read back and compared, in number, size and value, with the arguments
and with the parameters in the kernel's machine code.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends import nvidia

from bench.machine import compile_kernels

from .machine_code import parameter_sizes
from .null_driver import NullDriver, NullUtils

MOST = 256

#: The launcher adds two pointers to scratch memory, which these kernels do not use.
SCRATCH = 2

#: CUDA_ERROR_NOT_SUPPORTED, which every function of CUDA returns that `stub_cuda.c` does not define.
UNSUPPORTED = 801

#: How numbers are packed, by Triton's names of their types.
FORMATS = {"i1": "?", "i8": "b", "i32": "i", "i64": "q", "u8": "B", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


class Function(ctypes.Structure):
    """A kernel's parameters, as the stub reads them."""

    _fields_ = (("count", ctypes.c_int), ("sizes", ctypes.c_int * MOST))


class Launch(ctypes.Structure):
    """The last launch, as the stub keeps it."""

    _fields_ = (
        ("launches", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("values", (ctypes.c_ubyte * 8) * MOST),
    )


@functools.cache
def loaded() -> tuple[Launch, Any]:
    """(the last launch as the stub keeps it, Triton's utilities for CUDA). Makes the stub the process's libcuda."""
    from triton.backends.nvidia.driver import CudaUtils

    include = Path(nvidia.__file__ or "", "..", "include").resolve()
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)  # some releases of Triton link every launcher against it
    library, source = Path(folder, "libcuda.so.1"), Path(__file__).with_name("stub_cuda.c")
    # Triton's runtime links against more of CUDA than a launch calls, and against more in every release.
    declared = sorted(set(re.findall(r"\bcu[A-Z]\w+", (include / "cuda.h").read_text())))
    others = Path(folder, "others.c")
    weak = "__attribute__((weak)) int {}(void) {{ return {}; }}\n"
    others.write_text("".join(weak.format(name, UNSUPPORTED) for name in declared))
    options = ["-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", library, source, others]
    subprocess.run([os.environ.get("CC", "cc"), *map(str, options)], check=True)
    last = Launch.in_dll(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), "last_launch")
    os.environ["TRITON_LIBCUDA_PATH"] = folder  # for the linker
    return last, CudaUtils()


class StubUtils(NullUtils):
    """Triton's utilities for CUDA, whose loading of kernels needs no device."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, Any, int, int, int]:
        sizes = parameter_sizes(binary)
        return self, Handle(Function(len(sizes), (ctypes.c_int * MOST)(*sizes))), 0, 0, 1024


class Handle(int):
    """The address of a `Function`, which it keeps alive, as a kernel's handle."""

    function: Function

    def __new__(cls, function: Function) -> Handle:
        handle = super().__new__(cls, ctypes.addressof(function))
        handle.function = function
        return handle


class CheckingLauncher:
    """Triton's launcher for CUDA. After every launch, it checks what the kernel would have got."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.runtime.driver import driver

        active: Any = driver.active
        self.launcher, self.driver = CudaLauncher(source, metadata), active
        self.name, self.signature, self.metadata = source.fn.__name__, tuple(source.signature.values()), metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Handle, *arguments: Any) -> None:
        self.launcher(x, y, z, stream, function, *arguments)
        passed = arguments[-len(self.signature) :]
        expected = [*flat(self.signature, passed), *[b"\0" * 8] * SCRATCH]
        last, sizes = self.driver.last, list(function.function.sizes[: function.function.count])
        got = [bytes(value)[:size] for value, size in zip(last.values, sizes, strict=False)]
        if got != expected:
            raise AssertionError(f"{self.name}: expected the parameters {expected}, the kernel would get {got}")
        threads = self.metadata.num_warps * 32
        if (*last.grid, last.threads, last.shared) != (x, y, z, threads, self.metadata.shared):
            raise AssertionError(f"{self.name}: a grid of {(x, y, z)} or {threads} threads became another")
        if not self.metadata.enable_fp_fusion:
            raise AssertionError(f"{self.name}: expected a launch that asks for fused multiply-add")
        self.driver.checked.append((self.name, id(self)))


def flat(kinds: Any, values: Any) -> Iterator[bytes]:
    """The bytes of all arguments that were not compiled in, in the order of their declaration."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind.startswith("*"):
            yield struct.pack("<Q", value.data_ptr())
        elif kind != "constexpr":
            yield struct.pack(f"<{FORMATS[kind]}", value)


class StubDriver(NullDriver):
    """The null driver with Triton's launcher for CUDA. `checked` has every kernel launched, by name and identity."""

    launcher_cls = CheckingLauncher

    def __init__(self, arch: int) -> None:
        super().__init__("cuda", arch)
        self.checked: list[tuple[str, int]] = []
        self.last, cuda = loaded()
        self.utils = StubUtils(cuda)

    @staticmethod
    def _loaded(module: object, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        """Keeps nothing of the files."""


def launch_all() -> None:
    """Calls the losses on CPU tensors, so that every kernel is launched with and without its optional arguments."""
    from fused_ignore_ce import (
        fused_cross_entropy,
        fused_distillation_loss,
        fused_linear_cross_entropy,
        fused_linear_distillation_loss,
        fused_linear_log_probs,
        fused_top_k_distillation_loss,
    )

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def differentiate(loss: Any, *inputs: torch.Tensor) -> None:
        loss = loss[0] if isinstance(loss, tuple) else loss
        torch.autograd.grad(loss, inputs, torch.ones_like(loss))

    plain: dict[str, Any] = {"backend": "triton", "ignore_index": [-100, 3]}
    extras: list[dict[str, Any]] = [
        {},
        {"label_smoothing": 0.1, "weight": torch.ones(5003), "normalizer": torch.tensor(7.0)},
        {"softcap": 30.0, "z_loss": 1e-4, "token_weight": torch.ones(40), "return_stats": "differentiable"},
        {"logit_scale": 0.5, "reduction": "sum", "return_stats": True, "normalizer": None},
        {"grad_in_forward": True, "z_loss": 1e-4, "label_smoothing": 0.1},
        {"grad_in_forward": True, "inplace_backward": True, "reduction": "sum"},
        {"reduction": "none", "inplace_backward": True},
    ]
    in_float64 = ((torch.float64, more) for more in extras if "z_loss" in more)
    for dtype, options in [*((torch.bfloat16, more) for more in extras), *in_float64]:
        if options.get("weight") is not None:
            options = options | {"weight": options["weight"].to(dtype)}
        x = tensor(40, 5003, dtype=dtype)
        inputs = x * 1 if options.get("inplace_backward") else x
        differentiate(fused_cross_entropy(inputs, torch.arange(40), **plain | options), x)
    few, many = tensor(2, 131072, dtype=torch.bfloat16), tensor(70000, 8, dtype=torch.bfloat16)
    for x in (few, many):  # few rows are split and merged; many are reduced by several programs
        differentiate(fused_cross_entropy(x, torch.zeros(len(x), dtype=torch.long), **plain), x)
    images, probs = tensor(2, 50, 6, 7), tensor(4, 300)
    differentiate(fused_cross_entropy(images, torch.zeros(2, 6, 7, dtype=torch.long), **plain), images)
    target = torch.full((4, 300), 1 / 300, requires_grad=True)
    differentiate(fused_cross_entropy(probs, target, backend="triton"), probs, target)
    h, w = tensor(40, 16, dtype=torch.bfloat16), tensor(5003, 16, dtype=torch.bfloat16)
    for budget in (None, 10**6):
        linear = fused_linear_cross_entropy(h, w, torch.arange(40), memory_budget=budget, z_loss=1e-4, **plain)
        torch.autograd.grad(linear, (h, w), torch.tensor(2.0, dtype=linear.dtype))
    mixes: list[dict[str, Any]] = [{}, {"divergence": "jsd", "temperature": 2.0, "alpha": 0.5, "return_stats": True}]
    for more in mixes:
        x, teacher = tensor(41, 512, dtype=torch.bfloat16), torch.zeros(41, 512)
        differentiate(fused_distillation_loss(x, teacher, torch.arange(41), **plain, **more), x)
        distilled = fused_linear_distillation_loss(h, w, h.detach(), w.detach(), torch.arange(40), **plain, **more)
        differentiate(distilled, h, w)
        ids, log_probs = torch.arange(3).expand(40, 3), torch.full((40, 3), -2.0)
        of_top_k = fused_top_k_distillation_loss(h, w, ids, log_probs, torch.arange(40), **plain, **more)
        differentiate(of_top_k, h, w)
    for unaligned in (False, True):  # two calls that differ in nothing but alignment
        x, target = tensor(41, 512), torch.zeros(41, dtype=torch.long)
        weights = torch.ones(82)[int(unaligned) : 40 + int(unaligned)]
        target = target[int(unaligned) :][:40]
        differentiate(fused_cross_entropy(x[:40], target, token_weight=weights, return_stats=True, **plain), x)
    log_probs, entropy = fused_linear_log_probs(h, w, torch.arange(40), return_entropy=True, backend="triton")
    torch.autograd.grad(log_probs.sum() + entropy.sum(), (h, w))


def check(arch: int) -> list[str]:
    """Checks the launches of all losses. Returns the names of the kernels, once for every launch.

    The first call of a launch prepares it for later calls (`kernels/prepare.py`). So every loss is called three times:
    with nothing remembered, so that Triton chooses every kernel; while launches are prepared; and with the prepared
    launches. Here, Triton's own default is not to fuse multiplications and additions, so that launches have to ask.
    """
    from triton import knobs

    from fused_ignore_ce.kernels import prepare

    from .host import pretend

    with ExitStack() as stack:
        stack.enter_context(knobs.language.scope())
        knobs.language.default_fp_fusion = False
        driver = stack.enter_context(StubDriver(arch))
        pretend(stack)
        found = []
        for kinds in (lambda _: object(), prepare.kinds, prepare.kinds):
            with mock.patch.object(prepare, "kinds", kinds):
                launch_all()
            found.append(driver.checked.copy())
            driver.checked.clear()
    for other in found[1:]:
        for launched, wanted in zip(other, found[0], strict=True):
            if launched != wanted:
                raise AssertionError(f"{launched[0]}: expected the kernel that Triton chooses, got another")
    return [name for each in found for name, _ in each]


def main() -> None:
    compile_kernels("bench.proofs.launcher")
    checked = check(90)
    for name in sorted(set(checked)):
        print(f"{name:20} {checked.count(name)} launches, parameters as passed")


if __name__ == "__main__":
    main()
