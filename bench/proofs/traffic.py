"""Counts the bytes that kernels load and store, and compares them with the fewest that the loss needs.

    python -m bench.proofs.traffic [--quick] [--json FILE]

Triton's interpreter runs the real kernels, and every load and store is recorded; a lane counts if its mask is true.
Bytes bound the speed of these kernels. They are the same in every run, and counting them needs no GPU.

The fewest, for rows of V logits: forward reads V logits per kept row; backward reads V and writes V per kept row, and
writes V zeros per ignored row. The column "all" also counts targets, losses and sums.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F

from bench.speed.providers import version

from .meter import Launch, Traffic

#: The names of logits and gradient among the parameters of this package's kernels and of Liger's.
LOGITS = ("logits.x", "gradients.dx", "product.x", "X_ptr")


@dataclass(frozen=True)
class Moved:
    """What a pass over N rows of V logits moved."""

    reads: np.ndarray  # (N,) elements of logits and gradient read per row, divided by V
    writes: np.ndarray  # (N,) likewise, written
    logits: int  # bytes of logits and gradient
    total: int  # bytes of all tensors
    bound: int  # the fewest bytes of logits and gradient

    def __add__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


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
    """This package's traffic where a share of the rows is ignored."""
    from fused_ignore_ce.kernels import cross_entropy
    from fused_ignore_ce.kernels.chip import INTERPRETED, Chip
    from fused_ignore_ce.losses.cross_entropy import fused_cross_entropy

    chip = Chip(INTERPRETED.arch, multiprocessors=1) if case.busy else INTERPRETED

    def run(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        result = fused_cross_entropy(x, target, reduction="sum", backend="triton", **case.options)
        return result[0] if isinstance(result, tuple) else result

    with mock.patch.object(cross_entropy, "chip_of", return_value=chip):
        return _measure(run, case, share, 1.0)


def measure_liger(case: Case, share: float, upstream: float) -> Measurement:
    """Liger's traffic. Its forward writes the gradient; backward scales it if the upstream gradient is not 1."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    smoothing, softcap = case.options.get("label_smoothing", 0.0), case.options.get("softcap")

    def run(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LigerCrossEntropyFunction.apply(x, target, None, -100, 0.0, smoothing, "sum", softcap)[0]

    return _measure(run, case, share, upstream)


def _inputs(case: Case, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, targets). Ignored rows are scattered, so that tiles of several rows hold both kinds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.N, case.V, generator=generator).to(case.dtype)
    target = torch.randint(case.V, (case.N,), generator=generator)
    target[torch.randperm(case.N, generator=generator)[: round(share * case.N)]] = -100
    return (x.t().contiguous().t() if case.strided else x).requires_grad_(), target


def _reference(case: Case, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) by PyTorch in float64."""
    x = x.detach().double().requires_grad_()
    softcap = case.options.get("softcap")
    used = x if softcap is None else softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(used, target, reduction="sum", label_smoothing=case.options.get("label_smoothing", 0.0))
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def _measure(run: Callable, case: Case, share: float, upstream: float) -> Measurement:
    """Measures both passes. Checks loss and gradient, because a wrong kernel's bytes would mean nothing."""
    x, target = _inputs(case, share)
    loss_reference, dx_reference = _reference(case, x, target)
    with Traffic() as forward:
        loss = run(x, target)
    with Traffic() as backward:
        loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    torch.testing.assert_close(loss.detach().double(), loss_reference, rtol=0.02, atol=1e-3)
    if upstream == 1 or case.dtype != torch.bfloat16:  # the interpreter multiplies bfloat16 as if it were integers
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), dx_reference * upstream, rtol=0.02, atol=1e-3)
    kept = (target != -100).numpy()
    row = case.V * x.element_size()
    return Measurement(
        kept,
        _moved(forward.launches, case.N, row, bound=row * int(kept.sum())),
        _moved(backward.launches, case.N, row, bound=row * int(kept.sum() + case.N)),
    )


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

    def worst(rows: np.ndarray) -> float | None:
        return float(rows.max()) if len(rows) else None

    return {
        "case": str(case),
        "ignored": share,
        "passes": passes,
        "kept": {"read": worst(moved.reads[kept]), "written": worst(moved.writes[kept])},
        "of ignored": {"read": worst(moved.reads[~kept]), "written": worst(moved.writes[~kept])},
        "bytes": moved.logits,
        "fewest": moved.bound,
        "all bytes": moved.total,
    }


def records(case: Case, shares: tuple[float, ...], with_liger: bool) -> Iterator[dict[str, Any]]:
    """This package's passes, and Liger's if it has the options and logits are not strided, which it would copy."""
    with_liger = with_liger and not case.strided and case.options.keys() <= {"label_smoothing", "softcap"}
    for share in shares:
        ours = measure(case, share)
        yield _record(case, share, "ours, forward", ours.kept, ours.forward)
        yield _record(case, share, "ours, backward", ours.kept, ours.backward)
        yield _record(case, share, "ours, both", ours.kept, ours.forward + ours.backward)
        for upstream in (1.0, 0.5) if with_liger else ():
            try:
                liger = measure_liger(case, share, upstream)
            except Exception as e:  # the interpreter wraps every error in its own
                yield {"case": str(case), "ignored": share, "passes": "Liger", "failed": f"{type(e).__name__}: {e}"}
                with_liger = False
                break
            passes = f"Liger, both, upstream {upstream}"
            yield _record(case, share, passes, liger.kept, liger.forward + liger.backward)


HEAD = ("ignored", "passes", "kept: read", "written", "ignored: read", "written", "bytes", "fewest", "ratio", "all")


def cells(record: dict[str, Any]) -> list[Any]:
    """A record as a row of the printed table. Ratios are relative to the fewest bytes, if any are needed."""
    share = f"{record['ignored']:.0%}"
    if "failed" in record:
        return [share, f"{record['passes']}: not measured, {record['failed']}"]
    worst = [record[which][what] for which in ("kept", "of ignored") for what in ("read", "written")]
    moved, fewest, total = record["bytes"], record["fewest"], record["all bytes"]
    ratios = [moved / fewest, total / fewest] if fewest else [None, None]
    return [share, record["passes"], *worst, moved, fewest, *ratios]


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, which happens after this
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    parser = argparse.ArgumentParser(prog="python -m bench.proofs.traffic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case, half of the rows ignored")
    parser.add_argument("--json", type=Path, help="write every line to this file")
    options = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "triton", "liger-kernel")}
    print(", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items()))
    found = []
    for case in CASES[:1] if options.quick else CASES:
        of_case = list(records(case, (0.5,) if options.quick else SHARES, versions["liger-kernel"] is not None))
        print(f"\n{case}", tabulate(map(cells, of_case), HEAD, floatfmt=".3f"), sep="\n", flush=True)
        found += of_case
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
