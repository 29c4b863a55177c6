"""Counts what compiled kernels read and write, and compares it with the least that the loss needs.

    python -m bench.proofs.traffic [--arch 90] [--quick] [--json FILE]

The emulator runs what Triton compiled (`bench.proofs.emulator`), and counts every access. Bytes bound the speed of
these kernels. They are the same in every run, and counting them needs no GPU. What a cache keeps is not modelled.

The least, for rows of V logits: forward reads V logits per kept row; backward reads V and writes V per kept row, and
writes V zeros per ignored row. Besides, every warp of a program reads the target's logit, which is in the cache then.
A warp's instruction counts each element once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F

from bench import machine, truth

from .cases import ROW_OPERATIONS

if TYPE_CHECKING:
    from .emulator.launching import Emulator
    from .emulator.tensors import Memory


@dataclass(frozen=True)
class Case:
    """N rows of V logits, and options for fused_cross_entropy.

    With `strided`, neighbouring elements belong to neighbouring rows. With `busy`, the launcher assumes a chip so small
    that the rows keep it busy. Otherwise, it may split rows.
    """

    N: int
    V: int
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    strided: bool = False
    busy: bool = True

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        options += ["strided"] * self.strided + ["few rows"] * (not self.busy)
        return " ".join([f"N={self.N} V={self.V}", str(self.dtype).removeprefix("torch."), *options])


CASES = (
    Case(16, 5003, torch.bfloat16),  # V is no multiple of the block
    Case(16, 5003, torch.float32),
    Case(4, 20000, torch.bfloat16, busy=False),  # each row is split over several programs
    Case(64, 257, torch.float32),  # several rows to a tile
    Case(64, 500, torch.float32, strided=True),
    Case(16, 5003, torch.bfloat16, {"label_smoothing": 0.1}),
    Case(16, 5003, torch.float32, {"softcap": 30.0}),
    Case(16, 5003, torch.bfloat16, {"return_stats": True}),
    Case(16, 5003, torch.bfloat16, {"inplace_backward": True}),
    Case(16, 5003, torch.bfloat16, {"grad_in_forward": True}),
)
SHARES = (0.0, 0.5, 0.75, 1.0)


def records(emulator: Emulator, case: Case, share: float) -> list[dict[str, Any]]:
    """What forward and backward moved where a share of the rows is ignored, or the one pass that does both.

    Loss and gradient have to be right, or bytes mean nothing.
    """
    from fused_ignore_ce.kernels import chip, cross_entropy
    from fused_ignore_ce.losses.cross_entropy import fused_cross_entropy

    x, target = _inputs(case, share)
    wanted = truth.expected([x], target, partial(_reference, **case.options))
    like = replace(chip.EMULATED, multiprocessors=1) if case.busy else chip.EMULATED
    with mock.patch.object(cross_entropy, "chip_of", return_value=like):
        result = fused_cross_entropy(x, target, reduction="sum", backend="triton", **case.options)
        loss = result[0] if isinstance(result, tuple) else result
        forward, emulator.moved = emulator.moved, []
        (dx,) = torch.autograd.grad(loss, x)
        backward, emulator.moved = emulator.moved, []
    for found, value in zip((loss.detach(), dx), wanted, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=0.02, atol=1e-3)
    kept = target != -100
    if case.options.get("grad_in_forward"):
        return [_record(case, share, "one pass", [*forward, *backward], (x, dx), kept, 1)]
    return [
        _record(case, share, "forward", forward, (x,), kept, 0),
        _record(case, share, "backward", backward, (x, dx), kept, 1),
    ]


def _inputs(case: Case, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, targets). Ignored rows are scattered, so that tiles of several rows hold both kinds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.N, case.V, generator=generator).to(case.dtype)
    target = torch.randint(case.V, (case.N,), generator=generator)
    target[torch.randperm(case.N, generator=generator)[: round(share * case.N)]] = -100
    return (x.t().contiguous().t() if case.strided else x).requires_grad_(), target


def _reference(
    x: torch.Tensor, target: torch.Tensor, softcap: float | None = None, label_smoothing: float = 0.0, **_: Any
) -> torch.Tensor:
    """PyTorch's loss with the options that change its value."""
    used = x if softcap is None else softcap * torch.tanh(x / softcap)
    return F.cross_entropy(used, target, reduction="sum", label_smoothing=label_smoothing)


def of_rows(launches: Iterable[tuple[str, Memory]], *tensors: torch.Tensor) -> np.ndarray:
    """How often each row of tensors was read and written by the kernels that read logits, (2, rows)."""
    places = {tensor.data_ptr(): tensor.detach() for tensor in tensors}.values()
    memories = [memory for kernel, memory in launches if kernel in ROW_OPERATIONS.values()]
    return np.sum([memory.times(place).mean(-1) for memory in memories for place in places], axis=0)


def _record(
    case: Case, share: float, passes: str, launches: list[tuple[str, Memory]], tensors: tuple[torch.Tensor, ...],
    kept: torch.Tensor, writes: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of the report, with the largest figures of a kept and of an ignored row."""
    moved = of_rows(launches, *tensors)

    def worst(rows: np.ndarray) -> dict[str, float | None]:
        read, written = moved[:, rows].max(1, initial=0.0).round(6).tolist()
        return {"read": read, "written": written} if rows.any() else {"read": None, "written": None}

    row = case.V * case.dtype.itemsize
    return {
        "case": str(case),
        "ignored": share,
        "passes": passes,
        "kept": worst(kept.numpy()),
        "of ignored": worst(~kept.numpy()),
        "bytes": round(row * moved.sum()),
        "fewest": row * (int(kept.sum()) + writes * case.N),
        "all bytes": sum(memory.total_bytes for _, memory in launches),
    }


HEAD = ("ignored", "passes", "kept: read", "written", "ignored: read", "written", "bytes", "fewest", "all bytes")


def cells(record: dict[str, Any]) -> list[Any]:
    """A record as a row of the printed table."""
    _, share, passes, kept, ignored, *counts = record.values()
    return [f"{share:.0%}", passes, *kept.values(), *ignored.values(), *counts]


def main() -> None:
    machine.compile_kernels("bench.proofs.traffic")
    from .emulator.launching import SHARED, emulated

    parser = machine.parser("bench.proofs.traffic", __doc__, json="every line")
    parser.add_argument("--arch", type=int, default=90, choices=SHARED, help="what to compile for (90)")
    parser.add_argument("--quick", action="store_true", help="one case, half of the rows ignored")
    options = parser.parse_args()
    found: dict[str, Any] = {"header": machine.header(sys.argv[1:], "bench.proofs.traffic", arch=options.arch)}
    found["rows"] = []
    with emulated(options.arch, by_element=True) as emulator:
        for case in CASES[:1] if options.quick else CASES:
            of_case = [row for share in ((0.5,) if options.quick else SHARES) for row in records(emulator, case, share)]
            print(f"\n{case}", tabulate(map(cells, of_case), HEAD, floatfmt=".3f"), sep="\n", flush=True)
            found["rows"] += of_case
    if options.json:
        machine.write(options.json, found)


if __name__ == "__main__":
    main()
