"""Peak memory of a loss, forward and backward, beside the gradient it returns: one fresh process a figure.

python -m bench.memory                     # a table
python -m bench.memory NAME N V SHARE      # one figure, in bytes
"""

import subprocess
import sys

import torch

from bench.providers import LOGITS_LOSSES
from bench.workload import logits_and_target
from fused_ignore_ce.measure import PeakMemory

SHARES = (0.0, 0.75)
N, V = 2048, 32768


def peak(name: str, N: int, V: int, share: float) -> int:
    """In a fresh process: bytes above inputs and gradient. `name` is a key of LOGITS_LOSSES."""
    arguments = [sys.executable, "-m", "bench.memory", name, str(N), str(V), str(share)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def _measure(name: str, N: int, V: int, share: float) -> int:
    loss = LOGITS_LOSSES[name]
    small, target = logits_and_target(8, 64, share)
    loss(small, target).backward()  # thread pools and lazy imports are not the loss's
    x, target = logits_and_target(N, V, share)
    with PeakMemory(x.device) as memory:
        loss(x, target).backward()
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    return memory.bytes - x.numel() * x.element_size()


def _table() -> None:
    print(f"peak memory beside the gradient, MiB; N={N}, V={V}, bf16, PyTorch {torch.__version__}")
    print(f"{'':32}" + "".join(f"{share:>12.0%} ignored" for share in SHARES))
    for name in LOGITS_LOSSES:
        print(f"{name:32}" + "".join(f"{peak(name, N, V, share) / 2**20:20.0f}" for share in SHARES), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    else:
        _table()
