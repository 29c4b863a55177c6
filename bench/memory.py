"""Peak memory of a loss, forward and backward, beside the gradients it returns: one fresh process a figure.

python -m bench.memory                                 # tables
python -m bench.memory NAME SHAPE SHARE DTYPE [BUDGET] # one figure, in bytes; SHAPE is NxV, or NxVxD for linear losses
"""

import json
import subprocess
import sys

import torch

from bench.providers import LINEAR_LOSSES, LOGITS_LOSSES
from bench.workload import hidden_and_target, logits_and_target
from fused_ignore_ce.measure import PeakMemory

SHARES = (0.0, 0.75)
TABLES = ((LOGITS_LOSSES, (2048, 32768), "bfloat16"), (LINEAR_LOSSES, (2048, 32768, 1024), "float32"))


def peak(name: str, shape: tuple[int, ...], share: float, dtype: str, budget: int | None = None) -> int:
    """In a fresh process: bytes above inputs and gradients. `name` is a key of bench.providers."""
    sizes = "x".join(map(str, shape))
    arguments = [sys.executable, "-m", "bench.memory", name, sizes, str(share), dtype, json.dumps(budget)]
    return int(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(name: str, shape: tuple[int, ...], share: float, dtype: str, budget: int | None = None) -> int:
    """As `peak`, in this process."""
    loss = (LOGITS_LOSSES | LINEAR_LOSSES)[name]
    options = {} if budget is None else {"memory_budget": budget}
    workload = logits_and_target if len(shape) == 2 else hidden_and_target
    # Thread pools, lazy imports and the GEMM library's buffers are not the loss's.
    loss(*workload(*[64, 2048, 256][: len(shape)], share, getattr(torch, dtype))).backward()
    *inputs, target = workload(*shape, share, getattr(torch, dtype))
    with PeakMemory(target.device) as memory:
        loss(*inputs, target, **options).backward()
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    return memory.bytes - sum(t.numel() * t.element_size() for t in inputs)


def _tables() -> None:
    for losses, shape, dtype in TABLES:
        sizes = ", ".join(f"{name}={size}" for name, size in zip("NVD", shape, strict=False))
        print(f"peak memory beside the gradients, MiB; {sizes}, {dtype}, PyTorch {torch.__version__}")
        print(f"{'':44}" + "".join(f"{share:>12.0%} ignored" for share in SHARES))
        for name in losses:
            row = (peak(name, shape, share, dtype) / 2**20 for share in SHARES)
            print(f"{name:44}" + "".join(f"{mib:20.0f}" for mib in row), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        name, sizes, share, dtype, budget = [*sys.argv[1:], "null"][:5]
        print(measure(name, tuple(map(int, sizes.split("x"))), float(share), dtype, json.loads(budget)))
    else:
        _tables()
