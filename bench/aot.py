"""Every kernel in every configuration that a launcher can choose, compiled ahead of time: no GPU is needed.

    python -m bench.aot [--quick] [--arch 90] [--verbose] [--json FILE]

The real launchers run on tensors without memory, under a driver that only names an architecture, and what they
ask Triton to compile is caught. So signatures, specialisation and options are Triton's own, not a copy of them.
`cuobjdump` tells registers, spills and shared memory; the PTX tells how wide the logits are read and written.

Exit status 1 when a kernel does not compile, spills, or accesses logits narrowly where it could be wide.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ARCHS = (80, 90, 100)
DTYPES = ("bfloat16", "float16", "float32")
VECTOR_BYTES = 16
#: Kernel parameters that point to (B, T, V): the traffic, where width matters.
TILED = ("x_ptr", "probs_ptr", "dx_ptr", "dprobs_ptr")


@dataclass(frozen=True)
class Shape:
    """Logits (B, T, V); without `contiguous`, laid out as (B, V, T)."""

    B: int
    T: int
    V: int
    contiguous: bool

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
    """One cubin. `widths` maps "load x_ptr" and the like to the narrowest access in bytes, gathers left out."""

    job: Job
    BLOCK_N: int = 0
    BLOCK_V: int = 0
    num_warps: int = 0
    registers: int = 0
    spill: int = 0
    shared: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    rows_fastest: bool | None = None
    error: str | None = None


def wide_enough(report: Report) -> int:
    """Bytes that an access to logits must have at least.

    16 where a thread has so many elements of the tile: a tile of few rows of a small vocabulary has fewer elements
    than threads. Nothing is asked where lines are unaligned (only single elements are sure to be), nor of strided
    classes: rows are adjacent there, and each has its own mask (it may be ignored), which rules out vectors.
    """
    if not (report.job.shape.contiguous and report.job.shape.aligned):
        return 0
    elements = max(1, report.BLOCK_N * report.BLOCK_V // (report.num_warps * 32))
    return min(VECTOR_BYTES, elements * getattr(torch, report.job.dtype).itemsize)


def faults(report: Report) -> list[str]:
    """What is wrong with a cubin; empty when all is well."""
    if report.error:
        return [report.error]
    found = [f"spills {report.spill} bytes"] if report.spill else []
    if report.job.kernel == "merge_kernel":
        return found
    expected = {"load x_ptr"} | {f"load {f}_ptr" for f in report.job.features if f == "probs"}
    if report.job.kernel == "backward_kernel":
        expected |= {f"store {f}_ptr" for f in report.job.features if f == "dprobs"}
        expected |= set() if "no dx" in report.job.features else {"store dx_ptr"}
    needed = wide_enough(report)
    for access in sorted(expected):
        if access not in report.widths:
            found.append(f"no {access} found")
        elif report.widths[access] < needed:
            found.append(f"{access}: {report.widths[access]} bytes wide, not {needed}")
    if not report.job.shape.contiguous and min(report.BLOCK_N, report.BLOCK_V) > 1 and not report.rows_fastest:
        found.append("neighbouring threads do not access neighbouring rows")
    return found


def shapes() -> list[Shape]:
    """One shape for each tile the launchers choose, split and not, aligned and not."""
    from fused_ignore_ce.kernels import launch

    chip = launch.INTERPRETED
    many = chip.multiprocessors * launch.PROGRAMS_PER_MULTIPROCESSOR + 1
    ladder = [limit for limit, *_ in launch.BLOCKS if limit] + [2 * max(block for _, block, _ in launch.BLOCKS)]
    powers = [2**i for i in range((2 * max(ladder)).bit_length())]
    sizes = sorted({*powers, *(p - 1 for p in powers[2:])})
    rows = [t for t in sizes if t <= launch.tile(2**30, 1, True).BLOCK_N]
    chosen: dict[tuple, Shape] = {}
    for contiguous, V, T, B in itertools.product((True, False), sizes, rows, (many, 1)):
        shape = Shape(B, T, V, contiguous)
        chosen.setdefault((*tile_of(shape), shape.aligned), shape)
    return list(chosen.values())


def tile_of(shape: Shape) -> tuple:
    """What of a launch ends in the compiled forward kernel; without the last, in the backward kernel."""
    from fused_ignore_ce.kernels import launch

    chosen = launch.forward_launch(shape.B, shape.T, shape.V, shape.contiguous, launch.INTERPRETED)
    return shape.contiguous, chosen.BLOCK_N, chosen.BLOCK_V, chosen.num_warps, chosen.splits > 1


def feature_sets(kernel: str, ends: bool) -> list[tuple[str, ...]]:
    """Nothing, each feature alone, and all of them; with `ends`, only nothing and all."""
    if kernel == "merge_kernel":
        return [(), ("stats",)]
    forward = kernel == "forward_kernel"
    alone = ["weight", "smoothing", "scale", "softcap", *(["stats"] if forward else [])]
    # A softcap takes the scale in, so they do not go together.
    everything = tuple(f for f in alone if f != "scale")
    all_probs = ("probs", *([] if forward else ["dprobs"]), *everything)
    if ends:
        return [(), everything, all_probs]
    probs = [("probs",)] if forward else [("probs",), ("probs", "dprobs"), ("probs", "dprobs", "no dx")]
    return [(), *((f,) for f in alone), everything, *probs, all_probs]


def jobs(archs: tuple[int, ...], quick: bool) -> list[Job]:
    """Unaligned shapes, and all with `quick`, get only the ends of the feature sets."""
    chosen: dict[tuple, Job] = {}
    for arch, dtype, shape in itertools.product(archs, DTYPES[:1] if quick else DTYPES, shapes()):
        if quick and not (shape.aligned and has_all_rows(shape)):
            continue
        tile = tile_of(shape)
        kernels = {"forward_kernel": tile, "backward_kernel": tile[:-1]} | ({"merge_kernel": ()} if tile[-1] else {})
        for kernel, distinct in kernels.items():
            for features in feature_sets(kernel, ends=quick or not shape.aligned):
                key = (kernel, arch, dtype, features, distinct, shape.aligned and distinct)
                chosen.setdefault(key, Job(kernel, arch, dtype, shape, features))
    return list(chosen.values())


def has_all_rows(shape: Shape) -> bool:
    """Whether the tile has as many rows as it would with rows in plenty."""
    return tile_of(shape)[1] == tile_of(Shape(shape.B, 2**20, shape.V, shape.contiguous))[1]


@dataclass
class OfflineDriver:
    """As much of a Triton driver as a launch asks for before it compiles."""

    arch: int

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


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
    if job.kernel != "backward_kernel":
        cross_entropy.forward(x, target, weight, probs, **options, with_stats="stats" in has)
        return
    dx = None if "no dx" in has else torch.empty_like(x)
    dprobs = torch.empty_like(x) if "dprobs" in has else None
    cross_entropy.backward(rows[0], x, target, weight, probs, rows, rows[0], **options, dx=dx, dprobs=dprobs)


def requested(job: Job) -> tuple[Any, Any]:
    """The (source, options) that the launcher asks Triton to compile."""
    from triton.compiler import ASTSource
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    caught = {}

    def catch(self, key, signature, device, constexprs, options, attrs, warmup):
        caught[self.fn.__name__] = ASTSource(self, signature, constexprs, attrs), options

    driver.set_active(OfflineDriver(job.arch))
    with mock.patch.object(JITFunction, "_do_compile", catch):
        launch(job)
    return caught[job.kernel]


def build(job: Job) -> Report:
    try:
        return compiled(job)
    except Exception as e:
        return Report(job, error=f"{type(e).__name__}: {e}".strip().splitlines()[0])


def compiled(job: Job) -> Report:
    import triton

    source, options = requested(job)
    # Thousands of cubins, each looked at once, do not belong into the user's cache.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        kernel = triton.compile(source, target=OfflineDriver(job.arch).get_current_target(), options=options.__dict__)
        cubin = Path(cache, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "--dump-resource-usage", cubin], text=True)
    constants = {source.fn.arg_names[i]: value for (i, *_), value in source.constants.items()}
    names = [name for name, kind in source.signature.items() if kind != "constexpr"]
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Report(
        job,
        BLOCK_N=constants["BLOCK_N"],
        BLOCK_V=constants.get("BLOCK_V", 1),
        num_warps=options.num_warps,
        registers=used["REG"],
        spill=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,
        widths=access_widths(kernel.asm["ptx"], names),
        rows_fastest=rows_fastest(kernel.asm["ttgir"]),
    )


def access_widths(ptx: str, names: list[str]) -> dict[str, int]:
    """The narrowest access in bytes to every tiled tensor, by "load x_ptr", "store dx_ptr".

    Addresses are followed back to the kernel parameters that they come from. One that depends on a loaded value is
    a gather, such as the target's logit, and left out.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    accesses: list[tuple[str, int, str]] = []
    latest: dict[str, str] = {}  # within a basic block, the one definition that reaches; else any may
    for number, line in enumerate(ptx.splitlines()):
        if line.startswith("$L__BB"):
            latest.clear()
        opcode, _, operands = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line).partition(" ")
        found = re.findall(r"%r[ds]?\d+|\w+_param_\d+", operands)
        if re.match(r"(ld|st)\.global", opcode):
            lanes, bits = re.search(r"(?:\.v(\d))?\.[bfsu](\d+)", opcode).groups("1")
            address = re.search(r"\[\s*(%\w+)", operands)[1]
            accesses.append((opcode[:2], int(lanes) * int(bits) // 8, latest.get(address, address)))
        if not found or opcode.startswith(("st.", "setp")):
            continue
        several = operands.strip().startswith("{")
        written = operands.split("}")[0].count("%") if several else 1
        used = [latest.get(register, register) for register in found[written:]]
        for register in found[:written]:
            latest[register] = f"{register}@{number}"
            sources[register].add(latest[register])
            sources[latest[register]].update(["loaded"] if opcode.startswith(("ld.global", "ld.shared")) else used)

    @cache
    def origins(register: str) -> set[str]:
        seen: set[str] = set()
        pending = [register]
        while pending:
            new = sources[pending.pop()] - seen
            seen |= new
            pending += new
        parameters = {int(s.rsplit("_", 1)[1]) for s in seen if "_param_" in s}
        return {names[i] for i in parameters if i < len(names)} | (seen & {"loaded"})

    widths: dict[str, int] = {}
    for kind, width, address in accesses:
        if "loaded" not in origins(address):
            for name in origins(address) & set(TILED):
                access = f"{'load' if kind == 'ld' else 'store'} {name}"
                widths[access] = min(width, widths.get(access, width))
    return widths


def rows_fastest(ttgir: str) -> bool | None:
    """Whether neighbouring threads access neighbouring rows of the tile; None without a tile."""
    found = re.search(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr<\w+>, (#\w+)>", ttgir)
    order = found and re.search(rf"^{found[1]} = #ttg\.blocked<.*order = \[(\d), \d\]", ttgir, re.M)
    return order[1] == "0" if order else None


def summary(reports: list[Report]) -> str:
    lines = [f"{'kernel':16} {'arch':>5} {'cubins':>7} {'registers':>10} {'spill':>6} {'shared':>7}  narrowest access"]
    groups = defaultdict(list)
    for report in reports:
        groups[report.job.kernel, report.job.arch].append(report)
    for (kernel, arch), group in sorted(groups.items()):
        worst = (max(getattr(r, name) for r in group) for name in ("registers", "spill", "shared"))
        cells = "{:10} {:6} {:7}".format(*worst)
        lines.append(f"{kernel:16} sm_{arch:<3} {len(group):6} {cells}  {narrowest(group)}")
    return "\n".join(lines)


def narrowest(group: list[Report]) -> str:
    """Of the accesses that have to be 16 bytes wide."""
    widths: dict[str, int] = {}
    for report in group:
        if wide_enough(report) == VECTOR_BYTES:
            for access, width in report.widths.items():
                widths[access] = min(width, widths.get(access, width))
    return ", ".join(f"{access} {width} B" for access, width in sorted(widths.items()))


def row(report: Report) -> str:
    job, shape = report.job, report.job.shape
    layout = f"{'contiguous' if shape.contiguous else 'strided':10} {'aligned' if shape.aligned else 'unaligned':9}"
    tile = f"{report.BLOCK_N:4}x{report.BLOCK_V:<4} {report.num_warps} warps"
    split = "split" if job.kernel == "forward_kernel" and tile_of(shape)[-1] else ""
    used = f"{report.registers:3} registers {report.spill:3} spilt {report.shared:5} shared"
    widths = ", ".join(f"{access} {width} B" for access, width in sorted(report.widths.items()))
    features = "+".join(job.features) or "plain"
    return f"{job.kernel:15} sm_{job.arch:<3} {job.dtype:8} {layout} {tile} {split:5} {features:40} {used}  {widths}"


def main() -> int:
    if "TRITON_INTERPRET" in os.environ:  # it would replace the very functions to be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.aot", *sys.argv[1:]], environment)
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one architecture and dtype, largest tiles, few features")
    parser.add_argument("--arch", type=int, action="append", help=f"instead of {ARCHS}; may be repeated")
    parser.add_argument("--verbose", action="store_true", help="a line for every cubin")
    parser.add_argument("--json", type=Path, help="write every report to this file")
    options = parser.parse_args()

    import triton
    from tqdm import tqdm

    start = time.perf_counter()
    todo = jobs(tuple(options.arch or (ARCHS[1:2] if options.quick else ARCHS)), options.quick)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        reports = list(tqdm(pool.map(build, todo, chunksize=4), total=len(todo), unit="cubin"))
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print("\n".join(map(row, reports)) if options.verbose else summary(reports))
    failed = [report for report in reports if faults(report)]
    for report in failed:
        print(f"FAULT {row(report)}: {'; '.join(faults(report))}")
    print(f"{len(reports)} cubins in {time.perf_counter() - start:.0f} s, {len(failed)} with faults")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) | {"faults": faults(r)} for r in reports], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
