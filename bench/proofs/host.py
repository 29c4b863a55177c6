"""Measures the host's time of a call, and counts its launches, for this project's loss and Liger's, side by side.

    python -m bench.proofs.host [--rounds 30] [--json FILE]

Kernels are compiled and not launched (`bench.proofs.null_driver`), and tensors are on the CPU. What is compared is the
work of the host around the kernels: Python, autograd, allocations, and PyTorch's operations, which run on the CPU, on
tensors of one element per row. The figures do not include the device's time, the few microseconds that every CUDA
launch takes, switching the current device, or waiting for the device where a library reads a value on the host.
Libraries take turns, so that a busy machine slows down both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench import machine
from bench.packages import imported, stated, version
from fused_ignore_ce import fused_cross_entropy

from .null_driver import NullDriver

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


def libraries() -> dict[str, Loss]:
    ours = partial(fused_cross_entropy, backend="triton")
    found: dict[str, Loss] = {"fused_ignore_ce": ours, "fused_ignore_ce, one pass": partial(ours, grad_in_forward=True)}
    if version("liger-kernel"):
        found["liger_kernel"] = imported("liger_kernel.transformers.functional", "liger_cross_entropy")
    return found


def launches(function: Callable[[], object], driver: NullDriver) -> dict[str, int]:
    """Triton's kernels, PyTorch's operations that launch one, and its operations that wait for the device."""
    before = len(driver.launches)
    with torch.autograd.profiler.profile() as profile:
        function()
    events = [event for event in profile.function_events if event.name.startswith("aten::")]
    leaves = [event for event in events if not any(child.name.startswith("aten::") for child in event.cpu_children)]
    operations = sum(event.name.removeprefix("aten::") not in NO_LAUNCH | WAITS for event in leaves)
    waits = sum(event.name.removeprefix("aten::") in WAITS for event in events)
    return {"kernels": len(driver.launches) - before, "operations": operations, "waits": waits}


def measure(losses: dict[str, Loss], rounds: int) -> list[dict[str, Any]]:
    """For each library and direction: the median of its times in microseconds, and its launches."""
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
            value = loss(x, target)
            upstream[name] = torch.ones_like(value)
            backward = partial(torch.autograd.grad, value, x, upstream[name])
            counted[name] = launches(partial(loss, x, target), driver), launches(backward, driver)
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
    return [
        {"library": name, "direction": direction, "microseconds": round(statistics.median(spans) / 1e3, 1)} | counts
        for name in losses
        for direction, spans, counts in zip(("forward", "backward"), times[name], counted[name], strict=True)
    ]


def pretend(stack: ExitStack) -> None:
    """Makes the package treat CPU tensors as a GPU's. Otherwise it would interpret kernels and check every target."""
    from fused_ignore_ce.backends import choice
    from fused_ignore_ce.kernels import cross_entropy

    stack.enter_context(mock.patch.object(cross_entropy, "interpreted", _true))
    stack.enter_context(mock.patch.object(choice, "check_targets", _true))


def _true(*_: object) -> bool:
    """Replaces a function at the cost of a call. A Mock would take ten microseconds."""
    return True


def table(measured: list[dict[str, Any]]) -> str:
    """A line for every library and direction, and the ratios of both directions to the last library."""
    both: dict[str, float] = {}
    lines = [f"{'library':26} {'':8} {'us':>8}  kernels  operations  waits"]
    for row in measured:
        library = row["library"]
        both[library] = both.get(library, 0.0) + row["microseconds"]
        lines.append(
            f"{library:26} {row['direction']:8} {row['microseconds']:8.1f}  {row['kernels']:7}  {row['operations']:10}"
            f"  {row['waits']:5}"
        )
    *others, last = both
    lines += [f"{name}: {both[name] / both[last]:.2f} times the time of {last}" for name in others]
    return "\n".join(lines)


def main() -> None:
    machine.compile_kernels("bench.proofs.host")
    parser = machine.parser("bench.proofs.host", __doc__, json="the figures")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(libraries(), options.rounds)
    print(f"{stated('torch', 'triton')}; microseconds of the host, medians of {options.rounds * CALLS} calls")
    print(table(measured))
    if options.json:
        machine.write(options.json, measured)


if __name__ == "__main__":
    main()
