"""The tiles of logits that a plan makes: their matrix product, and the results of their rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.choice import implementation
from ..backends.protocol import Backend, Parts
from ..core.options import LossOptions
from ..core.rows import Block, Logits, Rows
from ..distributed import ranks
from ..distributed.ranks import Merged, Shard
from .plan import LinearPlan, product_elements


class Operands(NamedTuple):
    """Rows h with logits h @ w.T + b, and their targets. Ignored rows are left out, or are zero in h."""

    h: Tensor  # (N, D)
    w: Tensor  # (V, D)
    b: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    weight: Tensor | None  # (V,)
    probs: Tensor | None  # (N, V)


class Tiles:
    """The tiles of logits, which exist one after the other in one buffer."""

    def __init__(
        self,
        operands: Operands,
        options: LossOptions,
        plan: LinearPlan,
        *,
        dtype: torch.dtype,
        logits_dtype: torch.dtype | None,
        backend: str,
        with_stats: bool,
        shard: Shard | None,
    ) -> None:
        """Prepares the buffer. `dtype` is that of the products' operands, and of the logits if `logits_dtype` is None.

        With a shard, the operands are this rank's.
        """
        self.N, V = len(operands.h), len(operands.w)
        rows_a_chunk, classes_a_block = plan.tile(self.N, V)
        self.chunks, self.blocks = slices_of(self.N, rows_a_chunk), slices_of(V, classes_a_block)
        h, w = operands.h.to(dtype), operands.w
        if len(self.blocks) == 1:
            w = w.to(dtype)
        self.given, self.operands = operands, operands._replace(h=h, w=w)
        size = min(rows_a_chunk, self.N) * min(classes_a_block, V)
        self.buffer = h.new_empty(size, dtype=logits_dtype)
        #: The last blocks of the vocabulary whose logits are kept for the gradients, and their buffers.
        self.kept = {block.start: h.new_empty(size, dtype=logits_dtype) for block in self._last(plan.kept)}
        self.kernels: Backend = implementation(backend, h.device)
        self.options, self.with_stats, self.shard = options, with_stats, shard
        self.of_rank = Block(0, V) if shard is None else shard.block
        self.cast: tuple[slice, Tensor] | None = None

    def _last(self, count: int) -> list[slice]:
        return self.blocks[len(self.blocks) - count :]

    def tile(self, rows: slice, block: slice) -> Tensor:
        """The part of the buffer that holds this tile, (rows, classes)."""
        n, v = rows.stop - rows.start, block.stop - block.start
        return self.kept.get(block.start, self.buffer)[: n * v].view(n, v)

    def weight_of(self, block: slice) -> Tensor:
        """The rows of the head for a block of the vocabulary, in the dtype of the matrix products."""
        if self.cast is None or self.cast[0] != block:
            self.cast = None  # its memory is free before the next one is made
            self.cast = (block, self.operands.w[block].to(self.operands.h.dtype))
        return self.cast[1]

    def logits(self, rows: slice, block: slice) -> Tensor:
        out, h, b = self.tile(rows, block), self.operands.h[rows], self.operands.b
        w = self.weight_of(block)
        if out.dtype != h.dtype:
            _wide_product(out, h, w)
            return out if b is None else out.add_(b[block])
        if b is None:
            return torch.mm(h, w.t(), out=out)
        return torch.addmm(b[block].to(h.dtype), h, w.t(), out=out)

    def with_targets(self, x: Tensor, rows: slice, block: slice) -> Logits:
        """The logits of a tile and their targets, as a backend takes them."""
        _, _, _, target, weight, probs = self.operands
        return Logits(
            x.unsqueeze(0),
            target[rows],
            None if weight is None else weight[block],
            None if probs is None else probs[rows, block].unsqueeze(0),
        )

    def block_of(self, block: slice) -> Block:
        return Block(self.of_rank.first_class + block.start, self.of_rank.classes)

    def rows_of(self, rows: slice) -> Rows:
        """The results of a chunk of rows. If there is one block of the vocabulary, their logits stay in the buffer."""
        if len(self.blocks) == 1:
            logits = self.with_targets(self.logits(rows, self.blocks[0]), rows, self.blocks[0])
            return Rows(*self.kernels.forward(logits, self.options, with_stats=self.with_stats))
        parts = self.parts_of(rows)
        target = self.operands.target[rows]
        return Rows(*self.kernels.merge(target, parts, self.options, with_stats=self.with_stats))

    def parts_of(self, rows: slice) -> Parts:
        """The sums over each block of the vocabulary."""
        parts = None
        for i, block in enumerate(self.blocks):
            logits = self.with_targets(self.logits(rows, block), rows, block)
            parts = parts or self.kernels.new_parts(logits.x, len(self.blocks), self.with_stats)
            self.kernels.forward_part(
                logits, self.options, parts=parts, part=i, block=self.block_of(block), with_stats=self.with_stats
            )
        assert parts is not None
        return parts

    def merged_over_ranks(self, shard: Shard) -> Merged:
        """The results of all rows, from the sums over every rank's shard."""
        # Written into place, see `_joined`.
        parts = self.kernels.new_parts(self.operands.h.new_empty((1, self.N, 0)), 1, self.with_stats)
        for rows in self.chunks:
            for whole, part in zip(parts, self.kernels.combine(self.parts_of(rows), self.options), strict=True):
                if whole.shape[-1]:
                    whole[..., rows] = part
        return ranks.merge(self.kernels, shard, parts, self.operands[3:], self.options, self.with_stats)


def _wide_product(out: Tensor, h: Tensor, w: Tensor) -> None:
    """`out = h @ w.T` in out's dtype, which is wider than that of the operands. Nothing is rounded to the latter."""
    if out.is_cuda:
        torch.mm(h, w.t(), out_dtype=out.dtype, out=out)
        return
    h = h.to(out.dtype)
    for classes in slices_of(len(w), max(1, product_elements(out.numel(), w.shape[1]) // w.shape[1])):
        out[:, classes] = h @ w[classes].to(out.dtype).t()


def slices_of(size: int, step: int) -> list[slice]:
    """Slices of `size` elements in steps of `step`; at least one, so that empty sums are made too."""
    return [slice(start, min(start + step, size)) for start in range(0, max(size, 1), max(step, 1))]
