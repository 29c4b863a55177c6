"""Cases of the one pass that keeps its row on the chip: for a GPU or the emulator, in this process or one of its own.

As a program, it executes a selection in the emulator and prints JSON: Triton must not interpret there.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from bench.proofs.emulator.launching import SHARED, Emulator
from fused_ignore_ce.backends import reference
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Upstream
from fused_ignore_ce.kernels import chip as chips
from fused_ignore_ce.kernels import cross_entropy
from fused_ignore_ce.kernels.tables import ARITHMETIC, Program

HALF, SINGLE = torch.bfloat16, torch.float32
EVERYTHING = {"label_smoothing": 0.1, "softcap": 5.0, "logit_scale": -1.5}


@dataclass(frozen=True)
class Case:
    """Rows of `V` classes, some of them ignored and NaN; `shared` is the chip's shared memory."""

    V: int
    dtype: torch.dtype = HALF
    N: int = 5
    given: dict = field(default_factory=dict)  # options
    weight: bool = False
    stats: bool = False
    z_loss: float = 0.0
    inplace: bool = True
    arch: int = 90
    shared: int = 0
    multiprocessors: int = 1
    program: Program | None = None  # that a launch table has for such rows

    def __str__(self):
        names = [*self.given, *(name for name in ("weight", "stats", "z_loss") if getattr(self, name))]
        place = "" if self.inplace else "-apart"
        return (
            f"sm{self.arch}-N{self.N}-V{self.V}-{str(self.dtype)[6:]}-{'+'.join(names) or 'plain'}{place}-{self.shared}"
        )

    @property
    def chip(self):
        shared = self.shared or SHARED[self.arch]
        table = ARITHMETIC if self.program is None else replace(ARITHMETIC, on_chip=((None, self.program),))
        return replace(
            chips.EMULATED, arch=self.arch, multiprocessors=self.multiprocessors, shared_bytes=shared, table=table
        )


#: What every run executes, and what only `make test-compiled` does, or a GPU.
SELECTION = [
    Case(5003, N=7, stats=True),  # rows that are not aligned, several for a program, ignored ones in between
    Case(1000, SINGLE, given=EVERYTHING, weight=True, stats=True, z_loss=0.05, inplace=False),
    Case(24001, given={"label_smoothing": 0.1}, shared=20 << 10, N=3),  # read again, in part
]
MORE = [
    Case(V, dtype, given=given, shared=shared, stats=stats, weight=stats, z_loss=0.1 * stats, inplace=not stats, N=4)
    for V, shared in ((1, 0), (3, 0), (8, 0), (40, 0), (5000, 0), (33000, 0), (24000, 20 << 10), (40003, 48 << 10))
    for dtype in (HALF, torch.float16, SINGLE)
    for given, stats in (({}, False), ({"label_smoothing": 0.1}, False), ({"softcap": 5.0}, True), (EVERYTHING, True))
]

#: Programs that the tuner may choose.
TUNED = [Case(40000, program=Program(*each), N=4) for each in ((8, 32, 2), (16, 8, 4), (32, 8, 1))]


def problem(case, device):
    x = torch.randn(1, case.N, case.V, dtype=torch.float64, device=device).mul_(3).to(case.dtype)
    x[0, 0, : case.V // 3] = -1e4
    target = torch.randint(case.V, (case.N,), device=device)
    target[-1] = 3 * case.V // 4  # often in the piece that is written last
    target[1], target[0] = -100, case.V - 1
    x[0, 1] = float("nan")
    weight = (torch.rand(case.V, device=device) + 0.5).to(case.dtype) if case.weight else None
    return x, target, weight, torch.randn(case.N, device=device), torch.randn(case.N, device=device)


def check(case, device="cpu", kernels=cross_entropy):
    """Raises an AssertionError where rows or gradients are not what the reference says, rounded to the dtype."""
    x, target, weight, g, dz = problem(case, device)
    leaf = x.double().requires_grad_()
    wanted = reference.rows(
        leaf, target.view(1, -1), None if weight is None else weight.double(), **case.given
    )  # fmt: skip
    total = (g * wanted.loss.flatten()).sum() + case.z_loss * (dz * wanted.lse.flatten() ** 2).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    before, dx = x.clone(), x if case.inplace else torch.empty_like(x)
    options = LossOptions(**case.given, z_loss=case.z_loss)
    with mock.patch.object(kernels, "chip_of", return_value=case.chip):
        rows = kernels.forward_backward(
            Upstream(g, factor=None, token_weight=None), (x, target, weight, None), options, dx=dx,
            dz=dz if case.z_loss else None, with_stats=case.stats,
        )  # fmt: skip
    torch.testing.assert_close(rows.loss.double(), wanted.loss.flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.lse.double(), wanted.lse.flatten(), rtol=1e-5, atol=1e-5)
    if case.stats:
        torch.testing.assert_close(rows.entropy.double(), wanted.entropy.flatten(), rtol=1e-5, atol=2e-5)
        kept = target != -100
        assert torch.equal(
            rows.predicted[kept], before[0, kept].double().mul(case.given.get("logit_scale", 1.0)).argmax(1)
        )
    half_a_unit = torch.finfo(case.dtype).eps / 2
    error = (dx.double() - gradient).abs() - gradient.abs() * (1.1 * half_a_unit + 1e-5)
    assert error.max() <= 2e-6 * gradient.abs().max() + 2.0**-25 * (case.dtype == torch.float16)
    assert (dx[0, 1] == 0).all()
    assert case.inplace or torch.equal(x.nan_to_num(), before.nan_to_num())
    return x, dx


def run(case):
    """Executes a case in the emulator; returns (the kernel's name, reads and writes of a kept row's logit)."""
    torch.manual_seed(0)
    small = case.V < 10_000
    with Emulator(case.arch, all_orders=small) as emulator:
        x, dx = check(case)
    [(name, [kernel])] = emulator.kernels.items()
    logits = (3 if small else 1) * x.element_size() * case.V
    read, _ = kernel.moved[x.data_ptr()]
    _, written = kernel.moved[dx.data_ptr()]
    return name, float(read) / logits / (case.N - 1), float(written) / logits / case.N


def selection():
    """(name, reads, writes) of every selected case, each on another architecture."""
    chosen = [replace(case, arch=arch) for case, arch in zip(SELECTION, (100, 90, 80), strict=True)]
    return {str(case): run(case) for case in chosen}


def large():
    """The same for long rows."""
    return [run(Case(128256, N=3))]


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
