"""Records every load and store of kernels that run in Triton's interpreter; `bench.proofs.traffic` counts them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

#: What each of the interpreter's functions does to memory. Unmasked accesses call the masked functions, too.
ACCESSES = {
    "create_masked_load": ("load",),
    "create_masked_store": ("store",),
    "create_atomic_rmw": ("load", "store"),
    "create_atomic_cas": ("load", "store"),
}


@dataclass
class Launch:
    """What one launch moved. An access is (load or store, the address of every element, bytes per element)."""

    kernel: str
    tensors: dict[str, torch.Tensor]  # by the name of the kernel's parameter; an element of a tuple as "logits.x"
    accesses: list[tuple[str, np.ndarray, int]] = field(default_factory=list)

    def bytes(self, kind: str) -> int:
        return sum(len(addresses) * size for k, addresses, size in self.accesses if k == kind)

    def row_bytes(self, kind: str, name: str) -> np.ndarray:
        """The bytes moved of every row of a parameter's tensor. Elements of a row share all indices but the last.

        Memory that several parameters share, as a gradient written over the logits does, counts for the first.
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
    """The number of elements in memory from a tensor's first element to its last."""
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return 1 + sum(steps) if tensor.numel() else 0


def _within(tensor: torch.Tensor, addresses: np.ndarray) -> np.ndarray:
    start = tensor.data_ptr()
    return (addresses >= start) & (addresses < start + _span(tensor) * tensor.element_size())


def _rows_by_offset(tensor: torch.Tensor) -> np.ndarray:
    """The row that each element of memory belongs to; -1 in gaps, so that counting an access there is an error."""
    rows = torch.full((_span(tensor),), -1)
    numbers = torch.arange(tensor.shape[:-1].numel()).view(*tensor.shape[:-1], 1)
    rows.as_strided(tensor.shape, tensor.stride()).copy_(numbers.expand(tensor.shape))
    return rows.numpy()


def _tensors(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among arguments and in their named tuples, by name."""
    for name, value in arguments:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif hasattr(value, "_fields"):
            yield from _tensors((f"{name}.{field}", getattr(value, field)) for field in value._fields)


class Traffic(ExitStack):
    """A context in which every launch in Triton's interpreter is recorded, in `launches`.

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
            self.launches.append(Launch(executor.fn.__name__, dict(_tensors(arguments.items()))))
            return original(executor, *args, **kwargs)

        return launching

    def _accessing(self, original: Callable, kinds: tuple[str, ...]) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def accessing(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            pointers = arguments["ptrs" if "ptrs" in arguments else "ptr"]
            lanes = np.broadcast_to(arguments["mask"].data, pointers.data.shape) if "mask" in arguments else ...
            addresses = pointers.data[lanes].reshape(-1).astype(np.int64)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self.launches[-1].accesses += [(kind, addresses, size) for kind in kinds]
            return original(*args, **kwargs)

        return accessing
