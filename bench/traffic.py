"""Bytes that the kernels load and store, against the fewest that the loss needs.

    python -m bench.traffic

Triton's interpreter runs the real kernels and sees every load and store; a lane counts when its mask is true. That
is the performance of a kernel bound by memory, as a number that does not wobble, and no GPU is needed.

Fewest, for rows of V logits: forward reads V of every kept row; backward reads V and writes V of every kept row and
writes V (zeros) of every ignored one. Targets, losses and sums come on top: the column "all tensors".
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

#: The parameters by which the kernels, ours and Liger's, know the logits and their gradient.
LOGITS = ("x_ptr", "dx_ptr", "X_ptr")

#: What the interpreter calls to access memory (unmasked accesses come through the masked), and what that does.
ACCESSES = {
    "create_masked_load": ("load",),
    "create_masked_store": ("store",),
    "create_atomic_rmw": ("load", "store"),
    "create_atomic_cas": ("load", "store"),
}


@dataclass
class Launch:
    """What one launch moved: (load or store, the address of every element, bytes of an element)."""

    kernel: str
    tensors: dict[str, torch.Tensor]  # by the kernel's parameters
    accesses: list[tuple[str, np.ndarray, int]] = field(default_factory=list)

    def bytes(self, kind: str) -> int:
        return sum(len(addresses) * size for k, addresses, size in self.accesses if k == kind)

    def row_bytes(self, kind: str, name: str) -> np.ndarray:
        """Bytes of every row (the elements that share all indices but the last) of a parameter's tensor.

        Memory that parameters share, as of a gradient written over the logits, belongs to the first of them.
        """
        tensor = self.tensors[name]
        earlier = list(self.tensors.values())[: list(self.tensors).index(name)]
        rows = _rows_by_offset(tensor)
        counts = np.zeros(tensor.shape[:-1].numel(), dtype=np.int64)
        for size in {size for k, _, size in self.accesses if k == kind}:
            addresses = np.concatenate([a for k, a, s in self.accesses if (k, s) == (kind, size)])
            addresses = addresses[_within(tensor, addresses)]
            for other in earlier:
                addresses = addresses[~_within(other, addresses)]
            offsets = (addresses - tensor.data_ptr()) // tensor.element_size()
            counts += size * np.bincount(rows[offsets], minlength=len(counts))
        return counts


def _span(tensor: torch.Tensor) -> int:
    """Elements of memory from the first to the last of a tensor."""
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return 1 + sum(steps) if tensor.numel() else 0


def _within(tensor: torch.Tensor, addresses: np.ndarray) -> np.ndarray:
    start = tensor.data_ptr()
    return (addresses >= start) & (addresses < start + _span(tensor) * tensor.element_size())


def _rows_by_offset(tensor: torch.Tensor) -> np.ndarray:
    """The row that each element of memory belongs to; -1, which nothing may count, in gaps."""
    rows = torch.full((_span(tensor),), -1)
    numbers = torch.arange(tensor.shape[:-1].numel()).view(*tensor.shape[:-1], 1)
    rows.as_strided(tensor.shape, tensor.stride()).copy_(numbers.expand(tensor.shape))
    return rows.numpy()


class Traffic(ExitStack):
    """Within it, every launch in Triton's interpreter is recorded in `launches`.

    >>> with Traffic() as traffic:
    ...     kernel[grid](x, out)
    >>> traffic.launches[0].row_bytes("load", "x_ptr")
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __enter__(self) -> Traffic:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        self.enter_context(mock.patch.object(GridExecutor, "__call__", self._launching(GridExecutor.__call__)))
        for name, kinds in ACCESSES.items():
            hooked = self._accessing(getattr(InterpreterBuilder, name), kinds)
            self.enter_context(mock.patch.object(InterpreterBuilder, name, hooked))
        return self

    def _launching(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def launching(executor, *args, **kwargs):
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            self.launches.append(Launch(executor.fn.__name__, tensors))
            return original(executor, *args, **kwargs)

        return launching

    def _accessing(self, original: Callable, kinds: tuple[str, ...]) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def accessing(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            pointers = arguments.get("ptrs", arguments.get("ptr"))
            lanes = np.broadcast_to(arguments["mask"].data, pointers.data.shape) if "mask" in arguments else ...
            addresses = pointers.data[lanes].reshape(-1).astype(np.int64)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self.launches[-1].accesses += [(kind, addresses, size) for kind in kinds]
            return original(*args, **kwargs)

        return accessing


@dataclass(frozen=True)
class Moved:
    """What a pass over N rows moved: of logits and gradient, per row in units of V elements; of all, in bytes."""

    reads: np.ndarray
    writes: np.ndarray
    logits: int
    total: int
    bound: int

    def __add__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Measurement:
    kept: np.ndarray  # (N,) bool
    forward: Moved
    backward: Moved


@dataclass(frozen=True)
class Case:
    """N rows of V logits, and options of fused_cross_entropy.

    `strided`: neighbouring elements belong to neighbouring rows. `busy`: rows suffice to keep the chip busy (taken
    to be a small one); otherwise, the launcher may split them.
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
    """Our traffic when a `share` of the rows is ignored."""
    from fused_ignore_ce.functional import fused_cross_entropy
    from fused_ignore_ce.kernels import cross_entropy, launch

    chip = launch.Chip(launch.INTERPRETED.arch, multiprocessors=1) if case.busy else launch.INTERPRETED

    def run(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        result = fused_cross_entropy(x, target, reduction="sum", backend="triton", **case.options)
        return result[0] if isinstance(result, tuple) else result

    with mock.patch.object(cross_entropy, "chip_of", return_value=chip):
        return _measure(run, case, share, 1.0)


def measure_liger(case: Case, share: float, upstream: float) -> Measurement:
    """Liger's. Its forward writes the gradient, which backward scales where the upstream gradient is not 1."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    smoothing, softcap = case.options.get("label_smoothing", 0.0), case.options.get("softcap")

    def run(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return LigerCrossEntropyFunction.apply(x, target, None, -100, 0.0, smoothing, "sum", softcap)[0]

    return _measure(run, case, share, upstream)


def _inputs(case: Case, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ignored rows are scattered, so that tiles of several rows hold both kinds."""
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
    """Both passes. The bytes of a kernel that computes something else would be no measurement."""
    x, target = _inputs(case, share)
    loss_reference, dx_reference = _reference(case, x, target)
    with Traffic() as forward:
        loss = run(x, target)
    with Traffic() as backward:
        loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    tolerance = {"rtol": 0.02, "atol": 1e-3}
    torch.testing.assert_close(loss.detach().double(), loss_reference, **tolerance)
    if upstream == 1 or case.dtype != torch.bfloat16:  # the interpreter multiplies bfloat16 as if it were integers
        torch.testing.assert_close(x.grad.double(), dx_reference * upstream, **tolerance)
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


def _row(share: float, what: str, kept: np.ndarray, moved: Moved) -> str:
    def worst(rows: np.ndarray) -> str:
        return f"{rows.max():10.3f}" if len(rows) else f"{'-':>10}"

    def ratio(moved_bytes: int) -> str:
        return f"{moved_bytes / moved.bound:8.3f}" if moved.bound else f"{'-' if moved_bytes else '0 / 0':>8}"

    rows = [worst(of[which]) for which in (kept, ~kept) for of in (moved.reads, moved.writes)]
    counts = f"{moved.logits:12,}{moved.bound:12,}{ratio(moved.logits)}{ratio(moved.total)}"
    return f"{share:6.0%}  {what:26}{''.join(rows)}{counts}"


def _rows(case: Case, with_liger: bool) -> Iterator[str]:
    yield f"\n{case}"
    yield (
        f"ignored  {'passes':26}kept: read    written ign.: read    written"
        f"{'bytes':>12}{'fewest':>12}{'ratio':>8}{'all':>8}"
    )
    # It has no such options, and copies strided logits first, outside its kernel.
    with_liger = with_liger and not case.strided and case.options.keys() <= {"label_smoothing", "softcap"}
    for share in SHARES:
        ours = measure(case, share)
        yield _row(share, "ours, forward", ours.kept, ours.forward)
        yield _row(share, "ours, backward", ours.kept, ours.backward)
        yield _row(share, "ours, both", ours.kept, ours.forward + ours.backward)
        for upstream in (1.0, 0.5) if with_liger else ():
            try:
                liger = measure_liger(case, share, upstream)
            except Exception as e:  # the interpreter wraps every error in its own
                yield f"         Liger: not measured, {type(e).__name__}: {e}"
                with_liger = False
                break
            yield _row(share, f"Liger, both, upstream {upstream}", liger.kept, liger.forward + liger.backward)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing above does
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    versions = {name: _version(name) for name in ("torch", "triton", "liger-kernel")}
    print(", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    for case in CASES:
        for line in _rows(case, versions["liger-kernel"] is not None):
            print(line, flush=True)


if __name__ == "__main__":
    main()
