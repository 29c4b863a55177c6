"""The memory of a launch: of the tensors that were passed, and of nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import numpy as np
import torch

#: 32-bit words of a `Touched` of `memory.h`.
TOUCHED = 5


class Block(ctypes.Structure):
    """A stretch of memory, as `memory.h` takes it."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("allowed", ctypes.c_void_p),  # a byte for every byte, 1 where it belongs to an element; NULL if all do
        ("grain", ctypes.c_uint64),  # bytes of the smallest element
        ("touched", ctypes.c_void_p),  # TOUCHED words for every grain, which note the programs that were there
        ("read", ctypes.c_uint64),  # bytes that threads read of it
        ("written", ctypes.c_uint64),
        ("asked", ctypes.c_void_p),  # for every grain, two pairs of 32-bit words, see `Memory.times`; or NULL
    )


class Memory:
    """The blocks of a launch. Tensors that overlap, as in a gradient that is written in place, share one.

    With `by_element`, it also counts how often each element is read and written.
    """

    def __init__(self, values: Iterable[object], by_element: bool = False) -> None:
        self._kept: list[np.ndarray] = []
        self._asked: list[np.ndarray] | None = [] if by_element else None
        self.tensors = [tensor for tensor in _tensors(values) if tensor.numel()]
        self.blocks: list[Block] = []
        group: list[torch.Tensor] = []
        end = 0
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.data_ptr()):
            if group and tensor.data_ptr() >= end:
                self.blocks.append(self._block(group, end))
                group = []
            group.append(tensor)
            end = max(end if len(group) > 1 else 0, tensor.data_ptr() + hull(tensor))
        if group:
            self.blocks.append(self._block(group, end))

    def _block(self, tensors: list[torch.Tensor], end: int) -> Block:
        start, grain = tensors[0].data_ptr(), min(tensor.itemsize for tensor in tensors)
        allowed = None
        if not any(tensor.numel() * tensor.itemsize == end - start for tensor in tensors):
            mask = np.zeros(end - start, dtype=np.uint8)
            for tensor in tensors:
                strides = [step * tensor.itemsize for step in tensor.stride()]
                first = mask[tensor.data_ptr() - start :]
                np.lib.stride_tricks.as_strided(first, (*tensor.shape, tensor.itemsize), (*strides, 1))[...] = 1
            allowed = self._keep(mask)
        touched = self._keep(np.zeros(TOUCHED * (-(-(end - start) // grain) + 1), dtype=np.uint32))
        asked = None
        if self._asked is not None:
            self._asked.append(np.zeros((-(-(end - start) // grain), 2, 2), dtype=np.uint32))
            asked = self._asked[-1].ctypes.data
        return Block(start, end, allowed, grain, touched, asked=asked)

    def times(self, tensor: torch.Tensor) -> np.ndarray:
        """How many requests read and wrote each element, (2, *shape). A warp's instruction is one request."""
        assert self._asked is not None, "only a memory that counts by element can tell"
        at = tensor.data_ptr()
        for block, asked in zip(self.blocks, self._asked, strict=True):
            if block.start <= at < block.end:
                step = tensor.itemsize // block.grain
                strides = (8, *(16 * step * stride for stride in tensor.stride()))
                first = asked[(at - block.start) // block.grain :, :, 1]
                return np.lib.stride_tricks.as_strided(first, (2, *tensor.shape), strides).copy()
        return np.zeros((2, *tensor.shape), dtype=np.uint32)

    @property
    def total_bytes(self) -> int:
        """All that was read and written, where a warp's instruction counts each element once."""
        assert self._asked is not None, "only a memory that counts by element can tell"
        counted = zip(self.blocks, self._asked, strict=True)
        return sum(block.grain * int(asked[..., 1].sum()) for block, asked in counted)

    def _keep(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data

    def forget(self) -> None:
        """Makes the launch run as if no program had run before."""
        for array in (*self._kept, *(self._asked or ())):
            if array.dtype == np.uint32:
                array.fill(0)

    def contents(self) -> list[bytes]:
        return [ctypes.string_at(block.start, block.end - block.start) for block in self.blocks]

    def restore(self, contents: list[bytes]) -> None:
        for block, content in zip(self.blocks, contents, strict=True):
            ctypes.memmove(block.start, content, len(content))


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def hull(tensor: torch.Tensor) -> int:
    """The bytes from a tensor's first element to the end of its last one."""
    return (
        sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    ) * tensor.itemsize
