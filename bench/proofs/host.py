"""Measures the host's time of a call, and counts its launches, for this project's loss and Liger's, side by side.

    python -m bench.proofs.host [--rounds 30] [--json FILE]

Kernels are compiled and not launched (`bench.proofs.null_driver`), and tensors are on the CPU. What is compared is the
work of the host around the kernels: Python, autograd, allocations, and PyTorch's operations, which run on the CPU, on
tensors of one element per row. The figures do not include the device's time, the few microseconds that every CUDA
launch takes, switching the current device, or waiting for the device where a library reads a value on the host.
Libraries take turns, so that a busy machine slows down both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import peers
from .null_driver import NullDriver, header

#: Rows and classes. The rows are too many to be split over programs, and few enough for an allocation to be cheap.
ROWS, CLASSES = 1024, 8192

#: How often a library is called before it is the other's turn.
CALLS = 20

#: PyTorch's operations that launch nothing on a GPU.
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "view", "reshape", "_reshape_alias", "expand", "as_strided",
    "detach", "detach_", "alias", "select", "slice", "unsqueeze", "squeeze", "transpose", "t", "permute", "flatten",
    "unflatten", "unbind", "resolve_conj", "resolve_neg", "lift_fresh", "result_type", "to", "is_same_size", "set_",
    "resize_", "is_nonzero",
}  # fmt: skip

#: PyTorch's operations that wait for the device.
WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select"}

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Launches:
    """Counts for one direction: Triton's kernels, PyTorch's operations that launch one, and operations that wait."""

    kernels: int
    operations: int
    waits: int

    def __str__(self) -> str:
        return f"{self.kernels} + {self.operations}" + (f", {self.waits} waits" if self.waits else "")


@dataclass(frozen=True)
class Host:
    """A library's median times in microseconds, and its launches."""

    library: str
    forward: float
    backward: float
    launches_forward: Launches
    launches_backward: Launches

    @property
    def both(self) -> float:
        return self.forward + self.backward


def ours(**options: Any) -> Loss:
    from fused_ignore_ce import fused_cross_entropy

    return lambda x, target: fused_cross_entropy(x, target, backend="triton", **options)


def liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-untyped]  # untyped

    return lambda x, target: liger_cross_entropy(x, target)


def libraries() -> dict[str, Loss]:
    found = {"fused_ignore_ce": ours(), "fused_ignore_ce, one pass": ours(grad_in_forward=True)}
    if peers.installed("liger_kernel"):
        found["liger_kernel"] = liger()
    return found


def launches(function: Callable[[], object], driver: NullDriver) -> Launches:
    before = len(driver.launches)
    with torch.autograd.profiler.profile() as profile:
        function()
    events = [event for event in profile.function_events if event.name.startswith("aten::")]
    leaves = [event for event in events if not any(child.name.startswith("aten::") for child in event.cpu_children)]
    operations = sum(event.name.removeprefix("aten::") not in NO_LAUNCH | WAITS for event in leaves)
    waits = sum(event.name.removeprefix("aten::") in WAITS for event in events)
    return Launches(len(driver.launches) - before, operations, waits)


def launches_of(
    loss: Loss, x: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor, driver: NullDriver
) -> tuple[Launches, Launches]:
    """The launches of forward, and those of backward."""
    value: list[torch.Tensor] = []
    forward = launches(lambda: value.append(loss(x, target)), driver)
    return forward, launches(lambda: torch.autograd.grad(value[0], x, upstream), driver)


def measure(losses: dict[str, Loss], rounds: int) -> list[Host]:
    x = torch.zeros(ROWS, CLASSES, dtype=torch.bfloat16, requires_grad=True)
    target = torch.arange(ROWS)
    times: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in losses}
    counted = {}
    upstream: dict[str, torch.Tensor] = {}  # passed in, so that autograd does not make one
    with ExitStack() as stack:
        driver = stack.enter_context(NullDriver("cuda", 90))
        pretend(stack)
        for name, loss in losses.items():
            for _ in range(3):  # compiles
                torch.autograd.grad(loss(x, target), x)
            upstream[name] = torch.ones_like(loss(x, target))
            counted[name] = launches_of(loss, x, target, upstream[name], driver)
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for _ in range(rounds):
            for name, loss in losses.items():
                for _ in range(CALLS):
                    start = time.perf_counter_ns()
                    result = loss(x, target)
                    middle = time.perf_counter_ns()
                    torch.autograd.grad(result, x, upstream[name])
                    end = time.perf_counter_ns()
                    times[name][0].append(middle - start)
                    times[name][1].append(end - middle)
    medians = {name: [round(statistics.median(t) / 1e3, 1) for t in both] for name, both in times.items()}
    return [Host(name, medians[name][0], medians[name][1], *counted[name]) for name in losses]


def pretend(stack: ExitStack) -> None:
    """Makes the package treat CPU tensors as a GPU's. Otherwise it would interpret kernels and check every target."""
    from fused_ignore_ce.backends import choice as backends
    from fused_ignore_ce.kernels import cross_entropy

    stack.enter_context(mock.patch.object(cross_entropy, "interpreted", _true))
    stack.enter_context(mock.patch.object(backends, "check_targets", _true))


def _true(*_: object) -> bool:
    """Replaces a function at the cost of a call. A Mock would take ten microseconds."""
    return True


def table(measured: list[Host]) -> str:
    lines = [
        f"{'library':26} {'forward':>8} {'backward':>8} {'both':>8}  {'launches forward':20} {'launches backward':20}"
    ]
    lines += [
        f"{h.library:26} {h.forward:8.1f} {h.backward:8.1f} {h.both:8.1f}"
        f"  {h.launches_forward!s:20} {h.launches_backward!s:20}"
        for h in measured
    ]
    *mine, last = measured
    lines += [f"{h.library}: {h.both / last.both:.2f} times the time of {last.library}" for h in mine]
    return "\n".join(lines)


def main() -> None:
    if "TRITON_INTERPRET" in os.environ:  # nothing would be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.proofs.host", *sys.argv[1:]], environment)
    parser = argparse.ArgumentParser(prog="python -m bench.proofs.host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(libraries(), options.rounds)
    print(f"{header()}; microseconds of the host, medians of {options.rounds * CALLS} calls")
    print("launches: Triton's kernels + PyTorch's operations that launch one, beside allocations")
    print(table(measured))
    if options.json:
        options.json.write_text(json.dumps([asdict(h) for h in measured], indent=1) + "\n")


if __name__ == "__main__":
    main()
