"""Runs compiled kernels on the CPU, right ones and broken ones, and prints JSON. A process of its own, because Triton
must not interpret."""

import importlib
import json
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from bench.proofs.cases import ROW_OPERATIONS
from bench.proofs.emulator import building, ptx
from bench.proofs.emulator.faults import KernelFault
from bench.proofs.emulator.launching import Emulator, emulated
from fused_ignore_ce import (
    fused_cross_entropy,
    fused_distillation_loss,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_log_probs,
    fused_top_k_distillation_loss,
)
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Block
from fused_ignore_ce.kernels import cross_entropy
from fused_ignore_ce.kernels.chip import chip_of
from tests.helpers import on_chip

ROOT = Path(__file__).parents[2]

#: Faults that are put into a copy of the kernels: (file, what is there, what takes its place).
FAULTS = {
    "none": ("tiles.py", "import triton\n", "import triton\n"),
    "mask": ("tiles.py", "tl.load(ptrs, mask=keep & (offs < v_end", "tl.load(ptrs, mask=keep & (offs <= v_end"),
    "stride": ("tiles.py", "t.to(tl.int64) * strides.t", "t.to(tl.int64) * strides.t * 2"),
    "cast": ("device_math.py", "u = x.to(ACC)", "u = x.to(tl.float16).to(ACC)"),
    "sign of a shift": ("device_math.py", "fused_multiply_add(u, height, -c)", "fused_multiply_add(u, height, c)"),
}

async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def copy_of_kernels(name, file, before, after):
    """The launchers of a copy of the kernels in which one piece of code is another."""
    folder = Path(tempfile.mkdtemp()) / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    text = (folder / file).read_text()
    assert text.count(before) == 1, f"{file} has {text.count(before)} times {before!r}"
    (folder / file).write_text(text.replace(before, after))
    package = "kernels_with_fault_" + name.replace(" ", "_")
    sys.modules[package] = module = types.ModuleType(package)
    module.__path__ = [str(folder)]
    return importlib.import_module(f"{package}.cross_entropy")


def loss_and_gradient(kernels, target=None):
    """How far the loss and the gradient of a copy of the kernels are from the truth, relative to their size."""
    torch.manual_seed(0)
    x = torch.randn(6, 1000) * 4
    target = torch.tensor([0, 999, -100, 5, 500, 1]) if target is None else target
    options, dx = LossOptions(), torch.empty_like(x)
    rows, totals = kernels.forward_reduce((x, target, None, None), None, None, options, mean=True)
    upstream = types.SimpleNamespace(
        dloss=torch.tensor(1.0), factor=totals.factor, token_weight=None, dlse=None, dentropy=None
    )
    kernels.backward(upstream, (x, target, None, None), rows_saved(rows), options, dx=dx, dprobs=None)
    truth = x.double().requires_grad_()
    loss = F.cross_entropy(truth, target)
    (gradient,) = torch.autograd.grad(loss, truth)
    return float(max((totals.total - loss).abs() / loss, (dx - gradient).abs().max() / gradient.abs().max()))


def rows_saved(rows):
    return types.SimpleNamespace(norm=rows.norm, entropy=None)


def outcome(function, *arguments):
    """A function's result, or its error in words."""
    try:
        return function(*arguments)
    except (KernelFault, ptx.NotUnderstood) as error:
        return f"{type(error).__name__}: {error}"


def faults():
    found = {}
    for name, change in FAULTS.items():
        with Emulator(90, all_orders=name == "none"):
            found[name] = outcome(loss_and_gradient, copy_of_kernels(name, *change))
    read = ptx.read

    def without_barriers(text):
        return read(re.sub(r"^\s*bar\.sync\s+0;", "", text, flags=re.MULTILINE))

    kernels = copy_of_kernels("barrier", *FAULTS["none"])
    with Emulator(90), mock.patch.object(building.ptx, "read", without_barriers):
        found["barrier"] = outcome(loss_and_gradient, kernels)
    before_store = "        barrier()\n        gl.store(dx + target"
    kernels = copy_of_kernels("stores", "on_chip.py", before_store, before_store.partition("\n")[2])
    with Emulator(90):
        found["stores"] = outcome(on_chip.check, on_chip.Case(33000, N=4), "cpu", kernels)
    kernels = copy_of_kernels("target", *FAULTS["none"])
    with Emulator(90):
        found["target"] = outcome(loss_and_gradient, kernels, torch.tensor([0, 999, -100, 5, 1000, 1]))
    return found


@gluon.jit
def copied(x_ptr, out_ptr, SIZE: gl.constexpr, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    at = gl.arange(0, SIZE, layout=layout)
    held = gl.allocate_shared_memory(gl.float32, [SIZE], shared)
    async_load(held, x_ptr + at)
    async_copy.commit_group()
    if WAIT:
        async_copy.wait_group(0)
    gl.store(out_ptr + at, held.load(layout))


@triton.jit
def added(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Every program adds to the same memory, without an atomic operation."""
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(out_ptr + at) + tl.load(x_ptr + at))


@triton.jit
def twice(x_ptr, out_ptr, V, SIZE: tl.constexpr):
    """Loads a row twice and stores it once, with masks. Every program also loads the first element without a mask."""
    at = tl.program_id(0) * V + tl.arange(0, SIZE)
    mask = tl.arange(0, SIZE) < V
    x = tl.load(x_ptr + at, mask=mask)
    tl.debug_barrier()
    x += tl.load(x_ptr + at, mask=mask)
    tl.store(out_ptr + at, x + tl.load(x_ptr), mask=mask)


@triton.jit
def gathered(x_ptr, out_ptr, stride, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride))


@triton.jit
def promised(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Promises an alignment that is not there."""
    at = tl.max_contiguous(tl.multiple_of(tl.arange(0, SIZE) + 1, 16), 16)
    tl.store(out_ptr + tl.arange(0, SIZE), tl.load(x_ptr + at))


@triton.jit
def converted(x_ptr, half_ptr, brain_ptr, whole_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(half_ptr + at, x.to(tl.float16))
    tl.store(brain_ptr + at, x.to(tl.bfloat16))
    tl.store(whole_ptr + at, tl.where(tl.abs(x) < 1e9, tl.floor(x), 0.0).to(tl.int32))


def small():
    """Kernels of this file."""
    found = {"chips": []}
    for arch in (75, 80):
        with emulated(arch):
            chip = chip_of(torch.device("cpu"))
            found["chips"].append([chip.arch, chip.shared_bytes])
    x = torch.randn(512)
    for wait in (True, False):
        out = torch.zeros(512)
        with Emulator(90):
            copied[(1,)](x, out, 512, wait)
        found["waited" if wait else "not waited"] = [bool((out == x).all()), bool(out.isnan().all())]
    x_loss = torch.randn(600, 16384).bfloat16().requires_grad_()  # so many rows are not split
    with emulated(90) as emulator:
        fused_cross_entropy(x_loss, torch.arange(600), backend="triton", reduction="sum").backward()
        for name in ("forward", "backward"):
            [kernel] = emulator.kernels[f"{name}_kernel"]
            counts = kernel.counts()
            found[name] = {
                "logits read": counts.read.bytes / 2 / x_loss.numel(),
                "sectors": counts.read.sectors * 16 / x_loss.numel(),
                "bank conflicts": counts.bank_conflicts,
                "powers": counts.threads["ex2.approx.ftz.f32"] / x_loss.numel(),
                "written": counts.written.bytes,
                "sectors written": counts.written.sectors,
            }
    with Emulator(90):
        found["misaligned"] = outcome(promised[(1,)], torch.randn(516), torch.zeros(512), 512)
        found["programs"] = outcome(added[(2,)], x, torch.zeros(512), 512)
        bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32)
        values = torch.cat([bits.view(torch.float32), torch.randn(2**16), torch.randn(2**16) * 2.0**-20])
        values[values.abs() < torch.finfo(torch.float32).tiny] = 0.0  # floor flushes subnormal numbers to zero
        results = [torch.empty_like(values, dtype=d) for d in (torch.float16, torch.bfloat16, torch.int32)]
        converted[(values.numel() // 1024,)](values, *results, 1024)
    whole = torch.where(values.abs() < 1e9, values.floor(), 0.0).int()
    expected = [values.half(), values.bfloat16(), whole]
    found["conversions"] = [torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
                            for a, b in zip(results, expected, strict=True)]  # fmt: skip
    return found | traffic()


def traffic():
    """How often elements are read and written: by kernels that do too much, and where bars are exact."""
    found = {}
    x, out = torch.randn(3, 40), torch.zeros(3, 40)
    with Emulator(90, by_element=True) as emulator:
        twice[(3,)](x, out, 40, 64, num_warps=1)
        wide = torch.randn(64, 3)[::2].t()
        gathered[(1,)](wide[1:], torch.zeros(32), wide.stride(1), 32, num_warps=1)
        (_, of_twice), (_, of_gathered) = emulator.moved
        found["read twice, written once"] = [of_twice.times(x)[0].tolist(), of_twice.times(out).tolist()]
        found["bytes"] = of_twice.total_bytes
        found["gathered"] = [of_gathered.times(wide[1:])[0, 0].tolist(), of_gathered.times(x).any().item()]
        emulator.moved.clear()
        cross_entropy.scale(torch.randn(2, 3, 700), torch.tensor(0.25), torch.tensor(4.0))
        ((_, memory),) = emulator.moved
        found["scaled by 1"] = [int(memory.times(tensor).sum()) for tensor in memory.tensors if tensor.dim() == 3]
        emulator.moved.clear()
        V, width = 5003, 1700  # launches on parts of the vocabulary, as in the linear loss
        x, target = torch.randn(1, 8, V), torch.tensor([0, -100, 1699, 1700, 5002, -100, 7, 3400])
        parts = cross_entropy.new_parts(x, 3, False)
        read = np.zeros(8)
        for part, start in enumerate(range(0, V, width)):
            block = x[:, :, start : start + width].contiguous()
            cross_entropy.forward_part(
                (block, target, None, None), LossOptions(), parts=parts, part=part, block=Block(start, V)
            )
            read += emulator.moved[-1][1].times(block)[0, 0].sum(-1)
        found["parts"] = (read / V).tolist()
    return found


def cases():
    """Every kernel, option and dtype: (name, function of a backend that returns losses, its inputs, targets).

    There are targets where inputs are logits.
    """

    def tensor(*shape, dtype=torch.float32):
        return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype).requires_grad_()

    def logits(name, x, target, **options):
        def loss(backend, x):
            more = {"weight": weight.to(x.dtype)} if "weight" in name else {}
            found = fused_cross_entropy(x, target, backend=backend, **options, **more)
            return found[0] if "return_stats" in options else found

        return name, loss, (x,), target

    def targets(N, V):
        target = torch.randint(V, (N,))
        target[::5] = -100
        return target

    some = torch.bfloat16
    weight, tokens = torch.rand(1000) + 0.5, torch.rand(20)
    yield logits("plain", tensor(20, 5000), targets(20, 5000))
    half = tensor(20, 5003, dtype=torch.float16)
    yield logits("float16", half, targets(20, 5003), logit_scale=0.5, inplace_backward=True)
    yield logits("smoothing and weight", tensor(20, 1000), targets(20, 1000), label_smoothing=0.1)
    yield logits("softcap", tensor(20, 1000), targets(20, 1000), softcap=5.0, z_loss=1e-2, token_weight=tokens)
    yield logits("split", tensor(3, 70000, dtype=some), targets(3, 70000), return_stats=True)
    yield logits("many", tensor(70000, 8, dtype=some), targets(70000, 8))
    yield logits("one pass", tensor(20, 5000, dtype=some), targets(20, 5000), grad_in_forward=True, z_loss=1e-2)
    yield logits("one pass in float64", tensor(20, 300, dtype=torch.float64), targets(20, 300), grad_in_forward=True)
    yield logits("float64", tensor(20, 300, dtype=torch.float64), targets(20, 300), softcap=5.0, reduction="none")
    yield logits("strided classes", tensor(2, 300, 6, 7), targets(84, 300).view(2, 6, 7))
    probs = torch.softmax(tensor(20, 300), 1).detach().requires_grad_()

    def of_probs(backend, x, probs):
        return fused_cross_entropy(x, probs, backend=backend)

    yield "probabilities", of_probs, (tensor(20, 300), probs), None

    def linear(backend, h, w):
        target = torch.arange(40)
        return fused_linear_cross_entropy(h, w, target, backend=backend, label_smoothing=0.1, memory_budget=3 * 10**5)

    def log_probs(backend, h, w):
        log_probs, entropy = fused_linear_log_probs(h, w, torch.arange(40), return_entropy=True, backend=backend)
        return log_probs * 0.3 + entropy

    def distilled(backend, x, **options):
        return fused_distillation_loss(x, teacher.to(x.dtype), some_ignored, backend=backend, **options)

    def mixed(backend, x):
        return distilled(backend, x, divergence="jsd", alpha=0.5)

    def linear_distilled(backend, h, w):
        return fused_linear_distillation_loss(
            h, w, h.detach() * 0.5, w.detach(), torch.arange(40), divergence="jsd", temperature=2.0, alpha=0.5,
            backend=backend,
        )  # fmt: skip

    def top_k_distilled(backend, h, w):
        ids = torch.arange(0, 400, 10).unsqueeze(1) + torch.tensor([0, 4000, 7])
        return fused_top_k_distillation_loss(
            h, w, ids, torch.full((40, 3), -2.0), torch.arange(40), temperature=2.0, alpha=0.5, backend=backend
        )

    teacher, some_ignored = tensor(20, 5000, dtype=some).detach(), targets(20, 5000)
    yield "distillation", distilled, (tensor(20, 5000, dtype=some),), some_ignored
    yield "distillation, two walks", mixed, (tensor(20, 5000, dtype=some),), some_ignored
    yield "linear distillation, two walks", linear_distilled, (tensor(40, 16), tensor(5003, 16)), None
    yield "top-k distillation", top_k_distilled, (tensor(40, 16), tensor(5003, 16)), None
    yield "linear", linear, (tensor(40, 16), tensor(5003, 16)), None
    yield "log-probabilities", log_probs, (tensor(40, 16), tensor(5003, 16)), None


def moved(emulator, target):
    """By kernel, what its launches read and wrote of each tensor of logits or gradients, in rows."""
    found = {}
    for kernel, memory in emulator.moved:
        if kernel not in ROW_OPERATIONS.values():
            continue
        N = next(tensor.numel() for tensor in memory.tensors if tensor.dtype == torch.int64)
        for tensor in {t.data_ptr(): t for t in memory.tensors if t.dim() > 1 and t.shape[-1] not in (N, 8)}.values():
            if tensor.shape[-1] < 300:
                continue
            read, written = memory.times(tensor).mean(-1).reshape(2, -1)
            kept = np.ones(len(read), bool) if target is None else (target.flatten() != -100).numpy()
            found.setdefault(kernel, []).append({
                "classes": tensor.shape[-1],
                "read": [read[kept].min(), read[kept].max()],
                "read of ignored": read[~kept].max(initial=0.0),
                "written": [written.min(), written.max()],
            })  # fmt: skip
    return found


def selection(arch="90"):
    """How far losses and gradients are from the truth: of compiled kernels and of PyTorch, in units of the dtype.

    Also what kernels read and wrote.
    """
    torch.manual_seed(0)
    found, kernels, traffic = {}, set(), {}
    for name, loss, inputs, target in cases():
        truth = tuple(x.detach().double().requires_grad_() for x in inputs)
        expected = loss("torch", *truth)
        upstream = torch.rand_like(expected) + 0.5

        def results(backend, inputs, loss=loss, upstream=upstream):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]  # which a backward may overwrite
            value = loss(backend, *leaves)
            return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]

        expected, pytorch = results("torch", truth), results("torch", inputs)
        with emulated(int(arch), all_orders=True, by_element=True) as emulator:
            ours = results("triton", inputs)
        kernels |= emulator.kernels.keys()
        traffic[name] = moved(emulator, target)
        units = [
            wanted.abs().max() * torch.finfo(value.dtype).eps for value, wanted in zip(ours, expected, strict=True)
        ]
        found[name] = [
            [
                float((value - wanted).abs().max() / unit)
                for value, wanted, unit in zip(each, expected, units, strict=True)
            ]
            for each in (ours, pytorch)
        ]
    return {"errors": found, "kernels": sorted(kernels), "traffic": traffic}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
