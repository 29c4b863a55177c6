"""Counts the bytes per token that a vocabulary-sharded loss sends, and measures the peak memory of a rank.

    python -m bench.distributed [--ranks 2 4] [--out DIR]

The losses are compared with PyTorch's `loss_parallel` and with gathering the logits. Every rank is a process on this
machine, over gloo. PyTorch's profiler tells the bytes that a rank hands to collectives in forward and backward. They
are multiplied by what the ring algorithms of NCCL send of them: 2 (R - 1) / R in an all-reduce, R - 1 in an all-gather
of the rank's own part. Nothing is timed, because processes that share one machine's cores say nothing about a network.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
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
from fused_ignore_ce.measure import PeakMemory

from . import machine

#: Tokens, classes of the whole vocabulary, features; three quarters of the tokens are ignored.
N, V, D, IGNORED = 2048, 32768, 512, 0.75
#: How much a rank sends, as a multiple of what it hands to the collective.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
}
TYPES = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}


def sharded(x: Tensor, dim: int, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, [Shard(dim)], run_check=False)


def replicated(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def torch_loss_parallel(x: Tensor, target: Tensor, mesh: DeviceMesh) -> None:
    with loss_parallel():
        F.cross_entropy(sharded(x, 1, mesh), replicated(target, mesh)).backward()


def gathered(x: Tensor, target: Tensor, mesh: DeviceMesh) -> None:
    F.cross_entropy(sharded(x, 1, mesh).redistribute(placements=[Replicate()]).to_local(), target).backward()


def linear_loss_parallel(h: Tensor, w: Tensor, target: Tensor, mesh: DeviceMesh) -> None:
    with loss_parallel():
        logits = F.linear(replicated(h, mesh), sharded(w, 0, mesh))
        F.cross_entropy(logits, replicated(target, mesh)).backward()


def linear_gathered(h: Tensor, w: Tensor, target: Tensor, mesh: DeviceMesh) -> None:
    logits = F.linear(replicated(h, mesh), sharded(w, 0, mesh))
    assert isinstance(logits, DTensor)
    F.cross_entropy(logits.redistribute(placements=[Replicate()]).to_local(), target).backward()


LOGITS: dict[str, Callable[..., Any]] = {
    "gathered logits, F.cross_entropy": gathered,
    "loss_parallel, F.cross_entropy": torch_loss_parallel,
    "fused_cross_entropy(process_group)": lambda x, y, mesh: fused_cross_entropy(
        x, y, process_group=mesh.get_group()
    ).backward(),
}
LINEAR: dict[str, Callable[..., Any]] = {
    "gathered logits, F.linear": linear_gathered,
    "loss_parallel, F.linear": linear_loss_parallel,
    "fused_linear_cross_entropy(process_group)": lambda h, w, y, mesh: fused_linear_cross_entropy(
        h, w, y, process_group=mesh.get_group()
    ).backward(),
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


def measure(name: str, rank: int, ranks: int, store: str) -> dict[str, float]:
    """One rank's figures: bytes sent per token, and bytes at the peak above its operands and their gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    loss = {**LOGITS, **LINEAR}[name]
    loss(*operands(name, rank, ranks, tokens=64), mesh)  # allocates thread pools and lazy imports before measuring
    given = operands(name, rank, ranks)
    dist.barrier()
    with PeakMemory(torch.device("cpu")) as memory:
        loss(*given, mesh)
    own = sum(t.numel() * t.element_size() for t in given if t.requires_grad)
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    given = operands(name, rank, ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss(*given, mesh)
    sent = bytes_sent(profile, ranks)
    dist.destroy_process_group()
    return {"bytes_per_token": sent / N, "peak_bytes": memory.bytes - own}


def bytes_sent(profile: Any, ranks: int) -> float:
    """The bytes of all collectives in a profile, in which gloo's events have the shape and type of what a rank gave."""
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
    """The largest figures of all ranks, each of which runs `measure` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.distributed", "--measure", name, f"{folder}/store"]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{name} on {ranks} ranks failed: {errors}")
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    return {key: max(each[key] for each in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results", help="where the file goes")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, store, rank, ranks = given.measure
        print(json.dumps(measure(name, int(rank), int(ranks), store)))
        return
    print(f"N={N}, V={V}, D={D}, float32, {IGNORED:.0%} ignored, PyTorch {torch.__version__}, gloo on one machine")
    header = machine.header(sys.argv[1:], module="bench.distributed")
    todo = [(name, ranks) for name in [*LOGITS, *LINEAR] for ranks in given.ranks]
    rows = [{"name": name, "ranks": ranks, **on_ranks(name, ranks)} for name, ranks in tqdm(todo, unit="measurement")]
    print(tabulate(rows, headers="keys", floatfmt=".1f"))
    result = {"header": header, "N": N, "V": V, "D": D, "ignored": IGNORED, "ranks": given.ranks, "rows": rows}
    (given.out / f"distributed-{header['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
