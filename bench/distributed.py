"""Counts the bytes per token that a vocabulary-sharded loss sends, and measures the peak memory of a rank.

    python -m bench.distributed [--ranks 2 4] [--out DIR]

The losses are compared with PyTorch's `loss_parallel` and with gathering the logits. Every rank is a process on this
machine, over gloo. PyTorch's profiler tells the bytes that a rank hands to collectives in forward and backward. They
are multiplied by what NCCL's ring algorithms send per byte: 2 (R - 1) / R for an all-reduce, and R - 1 for an
all-gather, to which a rank hands only its own part. Nothing is timed, because processes that share one machine's cores
say nothing about a network.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from tqdm import tqdm

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy

from . import machine
from .speed.memory import peak_bytes

#: Tokens, classes of the whole vocabulary, features; three quarters of the tokens are ignored.
N, V, D, IGNORED = 2048, 32768, 512, 0.75
#: How much a rank sends, as a multiple of what it hands to the collective.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
}
TYPES = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}


Loss = Callable[..., None]


def sharded_logits(mesh: DeviceMesh, x: Tensor, weight: Tensor | None = None) -> DTensor:
    """Sharded logits: `x` is this rank's shard of them or, if its shard of the head is given, the hidden states."""
    if weight is None:
        return DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
    hidden = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    logits = F.linear(hidden, DTensor.from_local(weight, mesh, [Shard(0)], run_check=False))
    assert isinstance(logits, DTensor)
    return logits


def gathered(mesh: DeviceMesh, *operands: Tensor) -> None:
    *given, target = operands
    logits = sharded_logits(mesh, *given)
    F.cross_entropy(logits.redistribute(placements=[Replicate()]).to_local(), target).backward()


def parallel(mesh: DeviceMesh, *operands: Tensor) -> None:
    *given, target = operands
    with loss_parallel():
        logits = sharded_logits(mesh, *given)
        F.cross_entropy(logits, DTensor.from_local(target, mesh, [Replicate()], run_check=False)).backward()


def fused(loss: Callable[..., Any]) -> Loss:
    return lambda mesh, *operands: loss(*operands, process_group=mesh.get_group()).backward()


LOGITS: dict[str, Loss] = {
    "gathered logits, F.cross_entropy": gathered,
    "loss_parallel, F.cross_entropy": parallel,
    "fused_cross_entropy(process_group)": fused(fused_cross_entropy),
}
LINEAR: dict[str, Loss] = {
    "gathered logits, F.linear": gathered,
    "loss_parallel, F.linear": parallel,
    "fused_linear_cross_entropy(process_group)": fused(fused_linear_cross_entropy),
}


def operands(name: str, rank: int, ranks: int, tokens: int = N) -> list[Tensor]:
    """This rank's shards of the loss's arguments."""
    torch.manual_seed(0)
    target = torch.randint(V, (tokens,))
    target[torch.randperm(tokens)[: round(tokens * IGNORED)]] = -100
    torch.manual_seed(rank)
    if name in LOGITS:
        return [torch.randn(tokens, V // ranks, requires_grad=True), target]
    h = torch.randn(tokens, D)
    dist.broadcast(h, 0)
    return [h.requires_grad_(), (torch.randn(V // ranks, D) / D**0.5).requires_grad_(), target]


def measure(rank: int, name: str, ranks: int, store: str) -> dict[str, float]:
    """One rank's figures: bytes sent per token, and bytes at the peak above its operands and their gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    loss = (LOGITS | LINEAR)[name]
    loss(mesh, *operands(name, rank, ranks, tokens=64))  # starts thread pools and runs lazy imports before measuring
    given = operands(name, rank, ranks)
    dist.barrier()
    peak = peak_bytes(torch.device("cpu"), lambda: loss(mesh, *given))
    own = sum(t.nbytes for t in given if t.requires_grad)
    given = operands(name, rank, ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss(mesh, *given)
    dist.destroy_process_group()
    return {"bytes_per_token": bytes_sent(profile, ranks) / N, "peak_bytes": peak - own}


def bytes_sent(profile: Any, ranks: int) -> float:
    """The bytes that a rank sends, from a profile: gloo's events have the shapes and types of what it handed over."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    sent = 0.0
    for event in events:
        name = str(event.get("name", ""))
        if name.startswith("gloo:"):
            dims, types = event["args"]["Input Dims"], event["args"]["Input type"]
            numbers = sum(math.prod(shape) * TYPES[kind] for shape, kind in zip(dims, types, strict=True))
            sent += SENT[name.removeprefix("gloo:")](ranks) * numbers
    return sent


def on_ranks(name: str, ranks: int) -> dict[str, float]:
    """The largest of each figure over all ranks. Each rank runs `measure` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        found = machine.in_processes(measure, name, ranks, f"{folder}/store", processes=ranks)
    return {key: max(each[key] for each in found) for key in found[0]}


def main() -> None:
    parser = machine.parser("bench.distributed", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    print(f"N={N}, V={V}, D={D}, float32, {IGNORED:.0%} ignored, PyTorch {torch.__version__}, gloo on one machine")
    header = machine.header(sys.argv[1:], module="bench.distributed")
    todo = [(name, ranks) for name in [*LOGITS, *LINEAR] for ranks in given.ranks]
    rows = [{"name": name, "ranks": ranks, **on_ranks(name, ranks)} for name, ranks in tqdm(todo, unit="measurement")]
    print(tabulate(rows, headers="keys", floatfmt=".1f"))
    result = {"header": header, "N": N, "V": V, "D": D, "ignored": IGNORED, "ranks": given.ranks, "rows": rows}
    machine.write(given.out / f"distributed-{header['date']}.json", result)


if __name__ == "__main__":
    main()
