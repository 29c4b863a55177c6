"""How the PyTorch backend walks over logits: kept rows only, a cache-sized block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements of a block of rows: 8 MiB of float32, which stay in the last-level cache between the passes over a block.
#: On a 2-core EPYC (32 MiB of cache; N=2048, V=32768, bf16), 2^20 to 2^22 took the same time and 2^23 a third more;
#: with fewer, larger blocks, threads wait for each other less where cores are shared.
BLOCK_ELEMENTS = 1 << 21

#: Elements that are scaled at a time where PyTorch would otherwise hold a tensor of the gradient's size: if the factor
#: has another dtype, or may not be finite.
SCALED_ELEMENTS = 1 << 20

#: Tensors of a block's size, in float32, that are alive at a time: at most this many, and two more with probabilities.
BLOCK_TEMPORARIES = 4


class RowBlock(NamedTuple):
    """Some kept rows of `x[b]`: a slice where no row is ignored, so that nothing is copied, else their indices."""

    b: int
    rows: slice | Tensor  # in x[b]
    out: slice | Tensor  # among all B * T rows
    size: int


def kept_blocks(x: Tensor, target: Tensor, ignore_index: int) -> Iterator[RowBlock]:
    """The kept rows of x (B, T, V), block by block."""
    B, T, V = x.shape
    step = rows_per_block(V)
    for b, target_b in enumerate(target.view(B, T)):
        kept = (target_b != ignore_index).nonzero().squeeze(1)
        whole = len(kept) == T
        for start in range(0, len(kept), step):
            stop = min(start + step, len(kept))
            if whole:
                yield RowBlock(b, slice(start, stop), slice(start + b * T, stop + b * T), stop - start)
            else:
                yield RowBlock(b, kept[start:stop], kept[start:stop] + b * T, stop - start)


def rows_per_block(V: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(V, 1))


def new_scratch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The buffer that every block of x (B, T, V) is read into."""
    _, T, V = x.shape
    return x.new_empty((min(rows_per_block(V), T), V), dtype=dtype)


def read(x: Tensor, block: RowBlock, scratch: Tensor) -> Tensor:
    """The rows of a block, in the scratch buffer and its dtype."""
    out = scratch[: block.size]
    if isinstance(block.rows, Tensor) and x.dtype == scratch.dtype:
        return torch.index_select(x[block.b], 0, block.rows, out=out)
    # On a CPU, PyTorch's copy from float16 to float32 does not notice that a tensor is lazily negated.
    return out.copy_(x[block.b][block.rows].resolve_neg())


def write(x: Tensor, block: RowBlock, values: Tensor) -> None:
    """Writes the rows of a block."""
    if isinstance(block.rows, slice):
        x[block.b, block.rows].copy_(values)
    else:
        x[block.b].index_copy_(0, block.rows, values.to(x.dtype))


def zero_ignored(gradient: Tensor, target: Tensor, ignore_index: int) -> None:
    """Writes zeros into the ignored rows of gradient (B, T, V)."""
    B, T, _ = gradient.shape
    for gradient_b, target_b in zip(gradient, target.view(B, T), strict=True):
        ignored = (target_b == ignore_index).nonzero().squeeze(1)
        if len(ignored):
            gradient_b.index_fill_(0, ignored, 0.0)


def aligned(x: Tensor, *others: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """All of them as (1, B * T, V) if all of them can be viewed so, so that blocks can span the first dimension."""
    flat = tuple(None if t is None else _flat_if_view(t) for t in others)
    if all(t is None or t.shape[0] == 1 for t in (_flat_if_view(x), *flat)):
        return _flat_if_view(x), flat
    return x, others


def _flat_if_view(x: Tensor) -> Tensor:
    B, T, V = x.shape
    if B == 1 or T == 0 or x.stride(0) == T * x.stride(1):
        return x.as_strided((1, B * T, V), (0, x.stride(1), x.stride(2)), x.storage_offset())
    return x


def scale(dx: Tensor, factor: Tensor | None, dloss: Tensor, *, out: Tensor | None = None) -> None:
    """`dx * dloss * factor` in the wider dtype, in place or into `out`. In place on CPU, a factor of 1 is skipped.

    A gradient of 0, as that of an ignored row, stays 0 even where the product is inf or NaN.
    """
    product = dloss if factor is None else dloss * factor
    known = product.item() if product.device.type == "cpu" else math.nan
    if out is None and known == 1.0:
        return
    into = dx if out is None else out
    product = product.reshape(1)  # with a dimension it takes part in type promotion: it is not rounded to bfloat16
    if math.isfinite(known) and (dx.dtype == product.dtype or not dx.is_contiguous()):
        torch.mul(dx, product, out=into)
        return
    parts = zip(*(_scaled_parts(t) for t in (dx, into)), strict=True)
    for part, part_into in parts:
        if math.isfinite(known):
            torch.mul(part, product, out=part_into)
        else:
            part_into.copy_(torch.where(part == 0, 0.0, part * product))


def _scaled_parts(t: Tensor) -> tuple[Tensor, ...]:
    return torch.split(t.view(-1), SCALED_ELEMENTS) if t.is_contiguous() else (t,)
