"""The walk over the tiles of a plan: logits by a matrix product, the rows by a backend, gradients by matrix products.

One buffer holds the logits of every tile in turn, and then their gradient. A tile that has only a block of the
vocabulary leaves sums, which are merged when its rows are complete: over the blocks, and over the ranks where the
vocabulary is sharded. There are three walks: `losses`, `gradients` of saved rows, and `losses_and_gradients`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.options import LossOptions
from ..core.rows import RowResults, Rows, Saved, Upstream
from ..distributed.ranks import Merged, Shard
from .gradients import Gradients, GradientSums, Wanted
from .tiles import Tiles


class Scale(NamedTuple):
    """The factors of the rows in a scalar loss, which is the sum of `loss * rows` and `z_loss * lse**2 * rows_z`."""

    rows: Tensor  # (N,)
    rows_z: Tensor | None  # (N,)

    def part(self, rows: slice) -> Scale:
        return Scale(self.rows[rows], None if self.rows_z is None else self.rows_z[rows])


def losses(tiles: Tiles) -> RowResults:
    """The results of all rows, merged over the ranks where the vocabulary is sharded."""
    with _no_autocast(tiles):
        if tiles.shard is not None:
            return _of_ranks(tiles.merged_over_ranks(tiles.shard), tiles.shard)
        found = None
        for rows in tiles.chunks:
            found = _joined(found, tiles.rows_of(rows), rows, tiles.N)
        assert found is not None
        return RowResults.of(found)


def gradients(tiles: Tiles, upstream: Upstream, saved: Saved, wanted: Wanted) -> Gradients:
    """The gradients of saved rows, from logits that are computed again."""
    with _no_autocast(tiles):
        sums = GradientSums(tiles, wanted)
        for rows in tiles.chunks:
            for block in sums.blocks:
                sums.add(rows, block, tiles.logits(rows, block), _part(upstream, rows), _saved_part(saved, rows))
        return sums.gradients()


def losses_and_gradients(tiles: Tiles, scale: Scale, wanted: Wanted) -> tuple[RowResults, Gradients]:
    """The results of all rows, and the gradients of their scaled sum.

    Where a tile has all classes of its rows, its logits are computed once.
    """
    with _no_autocast(tiles):
        sums = GradientSums(tiles, wanted)
        if tiles.shard is not None:
            merged = tiles.merged_over_ranks(tiles.shard)
            upstream = _upstream(scale, merged.rows, tiles.options)
            one_tile = len(tiles.chunks) == 1 and len(tiles.blocks) == 1
            for rows in tiles.chunks:
                for block in sums.blocks:
                    x = tiles.tile(rows, block) if one_tile else tiles.logits(rows, block)
                    sums.add(rows, block, x, _part(upstream, rows), _saved_part(merged.rows.saved, rows))
            return _of_ranks(merged, tiles.shard), sums.gradients()
        found = None
        for rows in tiles.chunks:
            if len(tiles.blocks) == 1:
                part = sums.add_in_one_pass(rows, *scale.part(rows))
            else:
                part = tiles.rows_of(rows)
                upstream = _upstream(scale.part(rows), part, tiles.options)
                for block in sums.blocks:
                    x = tiles.tile(rows, block) if block.start in tiles.kept else tiles.logits(rows, block)
                    sums.add(rows, block, x, upstream, part.saved)
            found = _joined(found, part, rows, tiles.N)
        assert found is not None
        return RowResults.of(found), sums.gradients()


def _no_autocast(tiles: Tiles) -> AbstractContextManager[Any]:
    """Switches autocast off: operands have their dtypes already, and sums have to stay in float32."""
    if tiles.operands.h.is_meta:
        return nullcontext()
    return torch.autocast(tiles.operands.h.device.type, enabled=False)


def _of_ranks(merged: Merged, shard: Shard) -> RowResults:
    return RowResults.of_group(*merged, torch.tensor(shard.block))


def _upstream(scale: Scale, rows: Rows, options: LossOptions) -> Upstream:
    """The gradients of the scalar loss with respect to the rows' results."""
    return Upstream(scale.rows, None if scale.rows_z is None else 2.0 * options.z_loss * rows.lse * scale.rows_z)


def _part(upstream: Upstream, rows: slice) -> Upstream:
    return Upstream(*(None if each is None else each[rows] for each in upstream))


def _saved_part(saved: Saved, rows: slice) -> Saved:
    entropy = None if saved.entropy is None else saved.entropy[rows]
    return Saved(saved.norm[:, rows].contiguous(), entropy)


def _joined(found: Rows | None, part: Rows, rows: slice, N: int) -> Rows:
    """Writes the results of a chunk's rows into `found`, and returns it.

    They are copied, not collected in a list: small tensors that stay between the large temporaries of one chunk and the
    next would leave holes in the heap that are too small for the latter. glibc's heap grew by a temporary per chunk.
    """
    if rows == slice(0, N):
        return part
    if found is None:
        found = Rows(*(field.new_empty((*field.shape[:-1], N if field.shape[-1] else 0)) for field in part))
    for whole, field in zip(found, part, strict=True):
        if whole.shape[-1]:
            whole[..., rows] = field
    return found
