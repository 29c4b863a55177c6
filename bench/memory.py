"""Peak memory of a loss, forward and backward, beside the gradients it returns: one fresh process a figure.

python -m bench.memory NAME SHAPE SHARE DTYPE [BUDGET]

The figure is in bytes. NAME is a provider's; SHAPE is NxV, or NxVxD for linear losses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.providers import named
from bench.workload import DEVICE, Case, tensors
from fused_ignore_ce.measure import PeakMemory

ROOT = Path(__file__).parent.parent


def peak(name: str, case: Case, budget: int | None = None) -> int:
    """In a fresh process: bytes above inputs and gradients."""
    sizes = "x".join(str(size) for size in (case.N, case.V, case.D) if size)
    arguments = [sys.executable, "-m", "bench.memory", name, sizes, str(case.ignored), case.dtype, json.dumps(budget)]
    return int(subprocess.run(arguments, check=True, cwd=ROOT, capture_output=True, text=True).stdout)


def measure(name: str, case: Case, budget: int | None = None) -> int:
    """As `peak`, in this process."""
    provider = named(case.kind, name)
    loss = provider.build()
    options = {} if budget is None else {"memory_budget": budget}
    # Thread pools, lazy imports and the GEMM library's buffers are not the loss's; nor is compiling for the shape.
    warm = case if provider.compiled else case._replace(N=64, V=2048, D=256 if case.D else 0)
    loss(*tensors(warm, DEVICE)).backward()
    *inputs, target = tensors(case, DEVICE)
    with PeakMemory(DEVICE) as memory:
        loss(*inputs, target, **options).backward()
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    gradients = 0 if provider.overwrites else sum(x.numel() * x.element_size() for x in inputs)
    return memory.bytes - gradients


if __name__ == "__main__":
    name, sizes, share, dtype, budget = [*sys.argv[1:], "null"][:5]
    N, V, D = [*map(int, sizes.split("x")), 0][:3]
    case = Case("memory", "linear" if D else "logits", N, V, D, float(share), dtype, "both")
    print(measure(name, case, json.loads(budget)))
