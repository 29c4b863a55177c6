"""Counts the bytes that kernels load and store, and compares them with the fewest that the loss needs.

    python -m bench.proofs.traffic [--quick] [--json FILE]

Triton's interpreter runs the real kernels, and every load and store is recorded; a lane counts if its mask is true.
Bytes bound the speed of these kernels. They are the same in every run, and counting them needs no GPU.

The fewest, for rows of V logits: forward reads V logits per kept row; backward reads V and writes V per kept row, and
writes V zeros per ignored row. The column "all" also counts targets, losses and sums.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F

from bench import machine, truth
from bench.packages import stated

from .meter import Launch, Traffic

#: The names of logits and gradient among the parameters of kernels.
LOGITS = ("logits.x", "gradients.dx", "product.x")


@dataclass(frozen=True)
class Moved:
    """What a pass over N rows of V logits moved."""

    reads: np.ndarray  # (N,) elements of logits and gradient read per row, divided by V
    writes: np.ndarray  # (N,) likewise, written
    logits: int  # bytes of logits and gradient
    total: int  # bytes of all tensors
    bound: int  # the fewest bytes of logits and gradient


@dataclass(frozen=True)
class Measurement:
    kept: np.ndarray  # (N,) bool
    forward: Moved
    backward: Moved


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


def measure(case: Case, share: float) -> Measurement:
    """The traffic where a share of the rows is ignored. Loss and gradient have to be right, or bytes mean nothing."""
    from fused_ignore_ce.kernels import cross_entropy
    from fused_ignore_ce.kernels.chip import INTERPRETED, Chip
    from fused_ignore_ce.losses.cross_entropy import fused_cross_entropy

    chip = Chip(INTERPRETED.arch, multiprocessors=1) if case.busy else INTERPRETED
    x, target = _inputs(case, share)
    wanted = truth.expected([x], target, partial(_reference, **case.options))
    with mock.patch.object(cross_entropy, "chip_of", return_value=chip):
        with Traffic() as forward:
            result = fused_cross_entropy(x, target, reduction="sum", backend="triton", **case.options)
        loss = result[0] if isinstance(result, tuple) else result
        with Traffic() as backward:
            loss.backward()
    for found, value in zip((loss.detach(), x.grad), wanted, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), value, rtol=0.02, atol=1e-3)
    kept = (target != -100).numpy()
    row = case.V * x.element_size()
    return Measurement(
        kept,
        _moved(forward.launches, case.N, row, bound=row * int(kept.sum())),
        _moved(backward.launches, case.N, row, bound=row * int(kept.sum() + case.N)),
    )


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


def _moved(launches: list[Launch], N: int, row: int, bound: int) -> Moved:
    rows = {kind: np.zeros(N, dtype=np.int64) for kind in ("load", "store")}
    for launch in launches:
        for kind, name in itertools.product(rows, set(LOGITS) & launch.tensors.keys()):
            rows[kind] += launch.row_bytes(kind, name)
    total = sum(launch.bytes(kind) for launch in launches for kind in rows)
    return Moved(rows["load"] / row, rows["store"] / row, int(sum(map(sum, rows.values()))), total, bound)


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
)
SHARES = (0.0, 0.5, 0.75, 1.0)


def _record(case: Case, share: float, passes: str, kept: np.ndarray, moved: Moved) -> dict[str, Any]:
    """One row of the report, with the largest figures of a kept and of an ignored row."""

    def worst(rows: np.ndarray) -> dict[str, float | None]:
        both = {"read": moved.reads[rows], "written": moved.writes[rows]}
        return {name: float(each.max()) if len(each) else None for name, each in both.items()}

    return {
        "case": str(case),
        "ignored": share,
        "passes": passes,
        "kept": worst(kept),
        "of ignored": worst(~kept),
        "bytes": moved.logits,
        "fewest": moved.bound,
        "all bytes": moved.total,
    }


HEAD = ("ignored", "passes", "kept: read", "written", "ignored: read", "written", "bytes", "fewest", "all bytes")


def cells(record: dict[str, Any]) -> list[Any]:
    """A record as a row of the printed table."""
    _, share, passes, kept, ignored, *counts = record.values()
    return [f"{share:.0%}", passes, *kept.values(), *ignored.values(), *counts]


def records(case: Case, shares: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    for share in shares:
        measured = measure(case, share)
        yield _record(case, share, "ours, forward", measured.kept, measured.forward)
        yield _record(case, share, "ours, backward", measured.kept, measured.backward)


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, which happens after this
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    parser = machine.parser("bench.proofs.traffic", __doc__, json="every line")
    parser.add_argument("--quick", action="store_true", help="one case, half of the rows ignored")
    options = parser.parse_args()
    print(stated("torch", "triton"))
    found = []
    for case in CASES[:1] if options.quick else CASES:
        of_case = list(records(case, (0.5,) if options.quick else SHARES))
        print(f"\n{case}", tabulate(map(cells, of_case), HEAD, floatfmt=".3f"), sep="\n", flush=True)
        found += of_case
    if options.json:
        machine.write(options.json, found)


if __name__ == "__main__":
    main()
