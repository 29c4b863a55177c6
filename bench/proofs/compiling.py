"""Compiles each kernel that the cases need once, in several processes, and keeps what proofs need of it."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from . import cases, chips, machine_code
from .accesses import access_widths, rows_together
from .cases import Case
from .null_driver import Kernel, NullDriver

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """What is compiled for: ("cuda", 90) or ("hip", "gfx942")."""

    backend: str
    arch: int | str
    chip: str = "H100"  # the launchers' choices depend on it; one of `chips.CHIPS`
    table: str = ""  # the launchers' table: a device of `kernels/tables.json`; empty for the arithmetic one

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


@dataclass(frozen=True)
class Job:
    """A kernel to compile. `request` is its key among the kernels that a case asks Triton for.

    Without a request, it is the first kernel that is launched or, for a backward pass, the last.
    """

    case: Case
    target: Target
    request: str = ""


@dataclass(frozen=True)
class Proof:
    """A compiled kernel, or the error that prevented it."""

    job: Job
    kernel: str = ""
    grid: tuple[int, int, int] = (0, 0, 0)
    num_warps: int = 0
    shared: int = 0  # bytes of shared memory
    tile: tuple[int, ...] = ()  # rows first
    held: tuple[int, int, int] | None = None  # pieces in shared memory, logits of a piece, whether more are read again
    code: machine_code.MachineCode | None = None
    widths: dict[str, int] = field(default_factory=dict)
    rows_together: bool | None = None
    amd: dict[str, int] = field(default_factory=dict)  # registers and spills, from the metadata of AMD's assembly
    error: str = ""
    binary: bytes = b""

    @property
    def threads(self) -> int:
        return self.num_warps * (64 if self.job.target.backend == "hip" else 32)


#: Compute units, bytes of L2 cache and resident threads per unit of MI300X and MI355X, from AMD's data sheets.
AMD_CHIPS = {"gfx942": (304, 4 * 2**20, 2048), "gfx950": (256, 4 * 2**20, 2048)}

#: For each architecture, a chip that has it.
CUDA_TARGETS = tuple(Target("cuda", chip.arch, chip.name) for chip in map(chips.chip, ("A100", "H100", "B200")))
HIP_TARGETS = tuple(Target("hip", arch, "") for arch in AMD_CHIPS)


def call(case: Case, target: Target, arguments: cases.Arguments | None = None) -> None:
    """Calls the launcher of a case. A driver of the target has to be active. By default, tensors have no memory."""
    if case.library != "fused_ignore_ce":
        from . import peers

        peers.LIBRARIES[case.library](case, target.arch)
        return
    from fused_ignore_ce.kernels import cross_entropy, distillation, top_k

    chip = launched_on(target)
    if case.operation == "on chip" and target.backend == "cuda":
        chip = replace(chip, shared_bytes=chips.chip(target.chip).shared)
    with (
        mock.patch.object(cross_entropy, "chip_of", return_value=chip),
        mock.patch.object(distillation, "chip_of", return_value=chip),
        mock.patch.object(top_k, "chip_of", return_value=chip),
    ):
        cases.OPERATIONS[case.operation](cross_entropy, arguments or cases.Arguments(case))


def launched_on(target: Target) -> Any:
    """The target's chip, as the launchers know it."""
    from fused_ignore_ce.kernels import tables
    from fused_ignore_ce.kernels.chip import Chip

    if target.backend == "hip":
        return Chip(target.arch, *AMD_CHIPS[str(target.arch)], warp_size=64)
    chip = chips.chip(target.chip)
    table = tables.TABLES[target.table] if target.table else tables.ARITHMETIC
    return Chip(chip.arch, chip.multiprocessors, chip.l2, chip.threads, table=table)


def with_tables(target: Target) -> list[Target]:
    """The target once with the arithmetic launch table, and once with every table of its architecture."""
    from fused_ignore_ce.kernels.tables import TABLES

    return [target, *(replace(target, table=name) for name, table in TABLES.items() if table.arch == target.arch)]


def jobs(every: Iterable[Case], target: Target) -> list[Job]:
    """Every kernel that the cases ask for with any table, each with the first such case. Nothing is compiled."""
    found: dict[str, Job] = {}
    with NullDriver(target.backend, target.arch, select=lambda request: False) as driver:
        for case, on in itertools.product(list(every), with_tables(target)):
            call(case, on)
            for request in driver.requests:
                found.setdefault(request, Job(case, on, request))
            driver.requests.clear()
    return list(found.values())


def compiled(job: Job) -> Proof:
    wanted = job.request.__eq__ if job.request else None
    driver = NullDriver(job.target.backend, job.target.arch, select=wanted)
    try:
        with driver:
            call(job.case, job.target)
        kernel, grid = driver.launches[0 if job.request or job.case.operation != "backward" else -1]
        return _proof(job, kernel, grid)
    except Exception as error:
        return Proof(job, error=reason(error))


def reason(error: BaseException) -> str:
    """The messages of an error and its causes in one line; only the end of a long one."""
    said = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    line = " ".join(" <- ".join(said).split())
    return line if len(line) <= 400 else f"...{line[-400:]}"


def _proof(job: Job, kernel: Kernel, grid: tuple[int, int, int]) -> Proof:
    facts: dict[str, Any] = {"kernel": kernel.name, "grid": grid, "binary": kernel.binary}
    metadata = kernel.metadata
    facts |= {"num_warps": metadata.num_warps, "shared": metadata.shared, "tile": tile(kernel.constants)}
    if "HELD" in kernel.constants:
        pieces, rest, _ = kernel.constants["HELD"]
        facts |= {"held": (pieces, kernel.constants["PIECE"][-1], rest)}
    if job.target.backend == "hip":
        return Proof(job, amd=amd_usage(kernel.stage("amdgcn")), **facts)
    widths = access_widths(kernel.stage("ptx"), kernel.pointers, several_rows=facts["tile"][0] > 1)
    facts |= {"widths": widths, "rows_together": rows_together(kernel.stage("ttgir"))}
    return Proof(job, code=machine_code.read(kernel.binary), **facts)


def tile(constants: dict[str, Any]) -> tuple[int, ...]:
    """The tile of logits that a program handles at a time, its rows first."""
    if "TILE" in constants:
        return tuple(constants["TILE"])[:-1]  # without the product of the others
    if "BLOCK_SIZE" in constants:
        return 1, constants["BLOCK_SIZE"]
    return constants.get("BLOCK_N", 1), constants.get("BLOCK_V", 1)


def amd_usage(assembly: str) -> dict[str, int]:
    """Registers and spills, from the metadata at the end of AMD's assembly."""
    names = ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {name: re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", assembly, re.MULTILINE) for name in names}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"The assembly's metadata lacks {', '.join(missing)}.")
    return {name: int(value[1]) for name, value in found.items() if value}


def compile_all(todo: list[Job]) -> Iterator[Proof]:
    """Compiles all jobs, and returns the results in the order of the jobs."""
    return of_all(compiled, todo)


def of_all(function: Callable[[Job], Result], todo: list[Job]) -> Iterator[Result]:
    """The results of a function that compiles a job, in the order of the jobs."""
    # Thousands of kernels that are looked at once do not belong in the user's cache.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        ProcessPoolExecutor(mp_context=get_context("spawn")) as pool,
    ):
        try:
            yield from pool.map(function, todo, chunksize=2)
        finally:
            pool.shutdown(cancel_futures=True)  # where the caller has taken enough of them


def keep(proofs: Iterable[Proof], folder: Path) -> None:
    """Writes the binaries into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, proof in enumerate(proofs):
        if proof.binary:
            name = re.sub(r"\W+", "-", f"{proof.kernel}-{proof.job.target}-{proof.job.case}")
            suffix = "cubin" if proof.job.target.backend == "cuda" else "hsaco"
            (folder / f"{number:04}-{name}.{suffix}").write_bytes(proof.binary)
