"""Every kernel in every configuration that a launcher can choose, compiled ahead of time: no GPU is needed.

    python -m bench.proofs.aot [--quick] [--arch 90] [--verbose] [--json FILE] [--summary FILE]

Exit status 1 when a kernel does not compile, spills, or accesses logits narrowly where it could be wide.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .cubin import Cubin, compiled, requested

ARCHS = (80, 90, 100)
DTYPES = ("bfloat16", "float16", "float32")
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Shape:
    """Logits (B, T, V); without `contiguous`, laid out as (B, V, T)."""

    B: int
    T: int
    V: int
    contiguous: bool
    itemsize: int = 2

    @property
    def aligned(self) -> bool:
        """Whether every line of the contiguous dimension starts at a multiple of 16, which Triton specialises on."""
        return (self.V if self.contiguous else self.T) % 16 == 0


@dataclass(frozen=True)
class Job:
    kernel: str
    arch: int
    dtype: str
    shape: Shape
    features: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    job: Job
    cubin: Cubin | None
    error: str = ""


@cache
def tile_of(shape: Shape) -> tuple:
    """What of a launch is compiled into the forward kernel; all but the last also into the backward kernel."""
    from fused_ignore_ce.kernels import launch

    chosen = launch.forward_launch(shape.B, shape.T, shape.V, shape.itemsize, shape.contiguous, launch.INTERPRETED)
    return shape.contiguous, chosen.BLOCK_N, chosen.BLOCK_V, chosen.num_warps, chosen.splits > 1


def has_all_rows(shape: Shape) -> bool:
    """Whether the tile has as many rows as it would with rows in plenty."""
    return tile_of(shape)[1] == tile_of(replace(shape, T=2**20))[1]


def shapes(itemsize: int) -> list[Shape]:
    """One shape for each tile the launchers choose, split and not; for tiles of all their rows, unaligned too."""
    from fused_ignore_ce.kernels import launch

    many = launch.INTERPRETED.multiprocessors * launch.PROGRAMS_PER_MULTIPROCESSOR + 1
    largest = 4 * max(max(limit or 0, size) for limit, size, _ in launch.BLOCKS)
    powers = [2**i for i in range(largest.bit_length())]
    sizes = [*powers, *(p - 1 for p in powers[2:])]  # aligned ones first, to be preferred
    chosen: dict[tuple, Shape] = {}
    for contiguous, V, T, B in itertools.product((True, False), sizes, sizes, (many, 1)):
        shape = Shape(B, T, V, contiguous, itemsize)
        chosen.setdefault((tile_of(shape), shape.aligned or not has_all_rows(shape)), shape)
    return list(chosen.values())


def feature_sets(kernel: str, ends: bool) -> list[tuple[str, ...]]:
    """Nothing, each feature alone, and all of them; with `ends`, only nothing and all.

    "part" is the forward kernel on a block of the vocabulary, as the linear loss launches it.
    """
    if kernel == "merge_kernel":
        return [(), ("stats",)]
    forward = kernel == "forward_kernel"
    alone = ("weight", "smoothing", "scale", "softcap", *(["stats"] if forward else []))
    # A softcap takes the scale in: they do not go together.
    everything = tuple(feature for feature in alone if feature != "scale")
    everything_probs = ("probs", *([] if forward else ["dprobs"]), *everything)
    if ends:
        return [(), everything, everything_probs]
    probs = [("probs",)] if forward else [("probs",), ("probs", "dprobs"), ("probs", "dprobs", "no dx")]
    return [(), *((feature,) for feature in alone), everything, *probs, everything_probs]


def jobs(archs: tuple[int, ...], dtypes: tuple[str, ...], quick: bool) -> list[Job]:
    """Every set of features for the widest aligned tile of each number of warps; the ends for all others.

    Tiles of all their rows give every thread the same number of elements, so the widest stand for the registers of
    all. With `quick`, only those and the ends.
    """
    chosen: dict[tuple, Job] = {}
    for arch, dtype in itertools.product(archs, dtypes):
        every = shapes(getattr(torch, dtype).itemsize)
        heaviest = [s for s in every if s.aligned and has_all_rows(s)]
        widest = {(*tile_of(s)[3:], s.contiguous): s for s in sorted(heaviest, key=lambda s: s.V)}.values()
        for shape in widest if quick else every:
            tile = tile_of(shape)
            kernels = {"forward_kernel": tile, "backward_kernel": tile[:-1], "merge_kernel": () if tile[-1] else None}
            for kernel, distinct in kernels.items():
                if distinct is None:
                    continue
                sets = feature_sets(kernel, ends=quick or shape not in widest)
                if kernel == "forward_kernel" and shape.contiguous and not tile[-1]:
                    sets += [("part", *features) for features in feature_sets(kernel, ends=True)]
                for features in sets:
                    key = (kernel, arch, dtype, features, distinct, shape.aligned or not distinct)
                    chosen.setdefault(key, Job(kernel, arch, dtype, shape, features))
    return list(chosen.values())


def logits(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    if shape.contiguous:
        return torch.empty(shape.B, shape.T, shape.V, dtype=dtype, device="meta")
    # At least two rows wide: with one, classes would be contiguous.
    return torch.empty(shape.B, shape.V, max(shape.T, 2), dtype=dtype, device="meta")[..., : shape.T].movedim(1, 2)


def launch(job: Job) -> None:
    """Calls the launcher as autograd does."""
    from fused_ignore_ce.kernels import cross_entropy

    has = set(job.features)
    x = logits(job.shape, getattr(torch, job.dtype))
    target = torch.empty(job.shape.B * job.shape.T, dtype=torch.int64, device="meta")
    rows = target.new_empty((2, len(target)), dtype=torch.float32)
    weight = x.new_empty(job.shape.V) if "weight" in has else None
    probs = torch.empty_like(x) if "probs" in has else None
    options = {
        "ignore_index": -100,
        "label_smoothing": 0.1 if "smoothing" in has else 0.0,
        "softcap": 30.0 if "softcap" in has else None,
        "logit_scale": 0.5 if "scale" in has else 1.0,
        "z_loss": 0.0,
    }
    if "part" in has:
        stats = "stats" in has
        cross_entropy.forward_part(
            x, target, weight, probs, **options, with_stats=stats, parts=cross_entropy.new_parts(x, 3, stats), part=1,
            first_class=job.shape.V, classes=3 * job.shape.V,
        )  # fmt: skip
        return
    if job.kernel != "backward_kernel":
        cross_entropy.forward(x, target, weight, probs, **options, with_stats="stats" in has)
        return
    dx = None if "no dx" in has else torch.empty_like(x)
    dprobs = torch.empty_like(x) if "dprobs" in has else None
    cross_entropy.backward(rows[0], x, target, weight, probs, rows, rows[0], **options, dx=dx, dprobs=dprobs)


def build(job: Job) -> Report:
    try:
        return Report(job, compiled(*requested(partial(launch, job), job.arch)[job.kernel], job.arch))
    except Exception as e:
        return Report(job, None, error=" ".join(f"{type(e).__name__}: {e}".split()))


def logits_accesses(job: Job) -> set[str]:
    """The accesses to tensors of the logits' shape that a kernel has to have."""
    if job.kernel == "merge_kernel":
        return set()
    accesses = {"load x_ptr"} | (
        {"load probs_ptr"} if "probs" in job.features and "no dx" not in job.features else set()
    )
    if job.kernel == "backward_kernel":
        accesses |= {"store dprobs_ptr"} if "dprobs" in job.features else set()
        accesses |= set() if "no dx" in job.features else {"store dx_ptr"}
    return accesses


def bytes_due(job: Job, cubin: Cubin) -> int:
    """How wide an access to logits has to be.

    16 bytes, or all that a thread has of the tile: a tile of few rows of a small vocabulary has fewer elements than
    threads. Nothing is asked where lines are unaligned, nor of strided classes: there, neighbouring elements belong
    to different rows, any of which may be ignored, so that each has its own mask.
    """
    if not (job.shape.contiguous and job.shape.aligned):
        return 0
    elements = max(1, cubin.BLOCK_N * cubin.BLOCK_V // (cubin.num_warps * 32))
    return min(VECTOR_BYTES, elements * getattr(torch, job.dtype).itemsize)


def faults(report: Report) -> list[str]:
    """What is wrong with a kernel; empty when all is well."""
    job, cubin = report.job, report.cubin
    if cubin is None:
        return [report.error]
    found = [f"spills {cubin.spill} bytes"] if cubin.spill else []
    for access in sorted(logits_accesses(job)):
        if access not in cubin.widths:
            found.append(f"no {access} found")
        elif cubin.widths[access] < bytes_due(job, cubin):
            found.append(f"{access} {cubin.widths[access]} bytes wide, not {bytes_due(job, cubin)}")
    if not job.shape.contiguous and min(cubin.BLOCK_N, cubin.BLOCK_V) > 1 and cubin.rows_fastest is False:
        found.append("neighbouring threads do not access neighbouring rows")
    return found


def widths(reports: list[Report]) -> str:
    narrowest: dict[str, int] = {}
    for report in reports:
        for access in logits_accesses(report.job) & report.cubin.widths.keys():
            narrowest[access] = min(report.cubin.widths[access], narrowest.get(access, VECTOR_BYTES))
    return ", ".join(f"{access} {width}" for access, width in sorted(narrowest.items()))


def summary(reports: list[Report]) -> str:
    groups = defaultdict(list)
    for report in reports:
        if report.cubin:
            groups[report.job.kernel, report.job.arch].append(report)
    lines = [f"{'kernel':16} arch   cubins  registers  spill  shared  bytes wide where 16 are due, at least"]
    for (kernel, arch), group in sorted(groups.items()):
        registers, spill, shared = (max(getattr(r.cubin, n) for r in group) for n in ("registers", "spill", "shared"))
        wide = widths([r for r in group if bytes_due(r.job, r.cubin) == VECTOR_BYTES])
        lines.append(f"{kernel:16} sm_{arch:<4}{len(group):6}{registers:11}{spill:7}{shared:8}  {wide}")
    return "\n".join(lines)


def totals(reports: list[Report], archs: tuple[int, ...], dtypes: tuple[str, ...], quick: bool) -> dict[str, Any]:
    """What result files say of a run."""
    cubins = [report.cubin for report in reports if report.cubin]
    return {
        "kernels": len(reports),
        "archs": archs,
        "dtypes": dtypes,
        "quick": quick,
        "spilling": sum(cubin.spill > 0 for cubin in cubins),
        "most registers": max((cubin.registers for cubin in cubins), default=0),
        "faults": [f"{row(report)}: {'; '.join(faults(report))}" for report in reports if faults(report)],
    }


def row(report: Report) -> str:
    job, cubin, shape = report.job, report.cubin, report.job.shape
    of = f"{job.kernel:15} sm_{job.arch:<3} {job.dtype:8} {'contiguous' if shape.contiguous else 'strided':10}"
    of += f" {'aligned' if shape.aligned else 'unaligned':9} {'x'.join(map(str, tile_of(shape)[1:3])):>8}"
    of += f" {tile_of(shape)[3]} warps {'split' if tile_of(shape)[4] else '':5} {'+'.join(job.features) or 'plain':41}"
    if cubin is None:
        return of
    return f"{of}{cubin.registers:4} registers{cubin.spill:4} spilt{cubin.shared:6} shared  {widths([report])}"


def main() -> int:
    if "TRITON_INTERPRET" in os.environ:  # it would replace the very functions that are to be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.proofs.aot", *sys.argv[1:]], environment)
    parser = argparse.ArgumentParser(prog="python -m bench.proofs.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one architecture and dtype, largest tiles, few features")
    parser.add_argument("--arch", type=int, action="append", help=f"instead of {ARCHS}; may be repeated")
    parser.add_argument("--dtype", action="append", help=f"instead of {DTYPES}; may be repeated")
    parser.add_argument("--verbose", action="store_true", help="a line for every kernel")
    parser.add_argument("--json", type=Path, help="write every report to this file")
    parser.add_argument("--summary", type=Path, help="write totals and faults to this file")
    options = parser.parse_args()

    import triton
    from tqdm import tqdm

    start = time.perf_counter()
    archs = tuple(options.arch or (ARCHS[1:2] if options.quick else ARCHS))
    dtypes = tuple(options.dtype or (DTYPES[:1] if options.quick else DTYPES))
    todo = jobs(archs, dtypes, options.quick)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        reports = list(tqdm(pool.map(build, todo, chunksize=4), total=len(todo), unit="kernel"))
    failed = [report for report in reports if faults(report)]
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print("\n".join(map(row, reports)) if options.verbose else summary(reports))
    for report in failed:
        print(f"FAULT {row(report)}: {'; '.join(faults(report))}")
    print(f"{len(reports)} kernels in {time.perf_counter() - start:.0f} s, {len(failed)} with faults")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) | {"faults": faults(r)} for r in reports], indent=1))
    if options.summary:
        options.summary.write_text(json.dumps(totals(reports, archs, dtypes, options.quick), indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
