"""Compiles small kernels without a GPU, and prints JSON. A process of its own, because Triton must not interpret."""

import json
import sys
from unittest import mock

import torch
import triton
import triton.language as tl

from bench.proofs import cases, compiling, launcher, machine_code, peers, published
from bench.proofs.null_driver import NullDriver


@triton.jit
def sums_per_thread(x_ptr, out_ptr, V, LANES: tl.constexpr, WIDTH: tl.constexpr):
    offs = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((LANES,), tl.float32)
    for v in range(0, V, LANES * WIDTH):
        total += tl.sum(tl.exp2(tl.load(x_ptr + v + offs).to(tl.float32)), 1)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def sum_per_program(x_ptr, out_ptr, V, LANES: tl.constexpr, WIDTH: tl.constexpr):
    offs = tl.arange(0, LANES * WIDTH)
    total = 0.0
    for v in range(0, V, LANES * WIDTH):
        total += tl.sum(tl.exp2(tl.load(x_ptr + v + offs).to(tl.float32)))
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit
def scaled(x_ptr, out_ptr, V, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Holds a tile while its sum is taken: with few registers allowed, it spills."""
    offs = tl.arange(0, LANES * WIDTH)
    x = tl.load(x_ptr + offs).to(tl.float32)
    y = tl.load(x_ptr + V + offs).to(tl.float32)
    tl.store(out_ptr + offs, x * tl.sum(y * x) + y)


def describe(kernel, grid):
    code = machine_code.read(kernel.binary)
    return {
        "name": kernel.name,
        "grid": grid,
        "num_warps": kernel.metadata.num_warps,
        "constants": {name: kernel.constants[name] for name in ("LANES", "WIDTH")},
        "parameters": kernel.parameters,
        "loops": [
            {"barriers": loop.barriers, "shuffles": loop.shuffles, "special": loop.special, "loaded": loop.loaded}
            for loop in code.loops
        ],
        "spills": code.spills,
        "registers": code.usage.registers,
    }


def small():
    """Three kernels of this file, launched on tensors without memory."""
    x = torch.empty(2**20, dtype=torch.bfloat16, device="meta")
    out = torch.empty(2**20, dtype=torch.float32, device="meta")
    with NullDriver("cuda", 90) as driver:
        sums_per_thread[(7, 2)](x, out, 2**16, LANES=256, WIDTH=8, num_warps=8)
        sum_per_program[(7,)](x, out, 2**16, LANES=256, WIDTH=8, num_warps=8)
        scaled[(1,)](x, out, 2**16, LANES=128, WIDTH=64, num_warps=4, maxnreg=32)
        scaled[(1,)](x, out, 2**16, LANES=128, WIDTH=8, num_warps=4)
        scaled[(3,)](x, out, 2**16, LANES=128, WIDTH=8, num_warps=4)
    with NullDriver("cuda", 90, select=lambda request: False) as dry:
        scaled[(1,)](x, out, 2**16, LANES=128, WIDTH=8, num_warps=4)
    return {
        "kernels": [describe(*launch) for launch in driver.launches],
        "requests": len(driver.requests),
        "dry": [len(dry.requests), len(dry.launches)],
    }


def liger():
    """Liger's kernel, by its own launcher."""
    [job] = compiling.jobs(peers.every(2048)[:1], compiling.Target("cuda", 90))
    proof = compiling.compiled(job)
    return {"error": proof.error, "tile": proof.tile, "loops": len(proof.code.loops), "grid": proof.grid}


def counted():
    """Instructions and bytes in the loops of Liger's kernel: of the installed release, and of the published source."""
    [job] = [
        job for job in compiling.jobs(peers.every(32000), compiling.Target("cuda", 90)) if "liger" in str(job.case)
    ]
    codes = compiling.compiled(job).code, published.AFTER.counts[90, 2]
    return [[(loop.instructions, loop.special, loop.loaded, loop.stored) for loop in code.loops] for code in codes]


def launched():
    """The kernels that the launcher and a profiler saw, all that exist, and the errors of two broken launchers."""
    from fused_ignore_ce.kernels import prepare, prepare_distillation

    profiled = []

    def hook(metadata):
        profiled.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    checked = launcher.check(90)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    straight = launcher.flat
    with mock.patch.object(launcher, "flat", lambda kinds, values: reversed(list(straight(kinds, values)))):
        arguments = error_of(launcher.check, 90)
    with mock.patch.object(prepare, "kinds", len):
        kernels = error_of(launcher.check, 90)
    modules = (prepare, prepare_distillation)
    every = [name for m in modules for name, value in vars(m).items() if isinstance(value, triton.JITFunction)]
    wrong = {"wrong arguments": arguments, "wrong kernels": kernels}
    return {"checked": checked, "profiled": profiled, "kernels": every} | wrong


def error_of(function, *arguments):
    """The message of a function's AssertionError; empty if it raises none."""
    try:
        function(*arguments)
    except AssertionError as error:
        return str(error)
    return ""


def tiles():
    """Draws launches of random shapes, and lists those that ask for a kernel that no case has."""
    import random

    target = compiling.Target("cuda", 90)
    known = {job.request for job in compiling.jobs(cases.every(("bfloat16",), quick=False), target)}
    rng = random.Random(0)
    drawn = []
    # On the chip, how many pieces of a row there are is compiled in, so that no list has all kernels.
    operations = [operation for operation in cases.ROW_OPERATIONS if operation != "on chip"]
    for _ in range(200):
        B, T, V = (int(2 ** rng.uniform(0, limit)) for limit in (4, 14, 18))
        operation = rng.choice(operations)
        features = rng.choice(cases.fullest(operation))
        drawn.append(cases.Case(operation, B, T, V, "bfloat16", features, contiguous=rng.random() < 0.7))
    unknown = [str(job.case) for job in compiling.jobs(drawn, target) if job.request not in known]
    return {"drawn": len(drawn), "unknown": unknown}


def tuned():
    """The launch tables of the kernels for a table's own architecture and for another, if a measured table is added."""
    from fused_ignore_ce.kernels.tables import TABLES, Program, Table

    ladder = ((None, Program(2, thread_logits=32)),)
    case = [cases.Case("forward", 1, 8192, 32000)]
    TABLES["A device"] = Table(ladder, ladder, (), "a test", arch=90)
    found = {arch: compiling.jobs(case, compiling.Target("cuda", arch)) for arch in (90, 80)}
    return {
        "tables": {arch: [job.target.table for job in jobs] for arch, jobs in found.items()},
        "warps": compiling.compiled(found[90][-1]).num_warps,
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
