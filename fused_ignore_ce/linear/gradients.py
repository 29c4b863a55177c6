"""The gradients of a linear loss's operands, which come tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.rows import Rows, Saved, Upstream, acc_dtype
from .plan import accumulates, product_elements
from .tiles import Tiles, slices_of


class Wanted(NamedTuple):
    """Which operands want a gradient."""

    h: bool
    w: bool
    b: bool
    probs: bool = False


class Gradients(NamedTuple):
    """The gradients of operands; None where not wanted."""

    h: Tensor | None
    w: Tensor | None
    b: Tensor | None
    probs: Tensor | None


class GradientSums:
    """Sums the gradients of the operands over the tiles."""

    def __init__(self, tiles: Tiles, wanted: Wanted) -> None:
        given, dtype, tile = tiles.given, tiles.operands.h.dtype, len(tiles.buffer)
        self.tiles = tiles
        self.dh = _Sum(given.h, dtype, len(tiles.blocks) > 1, tile) if wanted.h else None
        self.dw = _Sum(given.w, dtype, len(tiles.chunks) > 1, tile) if wanted.w else None
        self.db = given.w.new_zeros(len(given.w), dtype=acc_dtype(dtype)) if wanted.b else None
        self.dprobs = torch.empty_like(given.probs) if wanted.probs and given.probs is not None else None
        self.blocks = tiles.blocks if any(wanted) else []  # whose gradients are summed

    def add(self, rows: slice, block: slice, x: Tensor, upstream: Upstream, saved: Saved) -> None:
        """Overwrites the logits x of a tile with their gradient, and adds its products to the operands' gradients."""
        tiles = self.tiles
        tiles.kernels.backward(
            upstream,
            tiles.with_targets(x, rows, block),
            saved,
            tiles.options,
            dx=x.unsqueeze(0),
            dprobs=None if self.dprobs is None else self.dprobs[rows, block].unsqueeze(0),
            block=tiles.block_of(block),
        )
        self.add_products(rows, block, x)

    def add_in_one_pass(self, rows: slice, dloss: Tensor, dz: Tensor | None) -> Rows:
        """The results of a chunk of rows; their gradient is computed along with them."""
        tiles, block = self.tiles, self.tiles.blocks[0]
        if not self.blocks:
            return tiles.rows_of(rows)
        x = tiles.logits(rows, block)
        found = tiles.kernels.forward_backward(
            Upstream(dloss),
            tiles.with_targets(x, rows, block),
            tiles.options,
            dx=x.unsqueeze(0),
            dz=dz,
            with_stats=tiles.with_stats,
        )
        self.add_products(rows, block, x)
        return Rows(*found)

    def add_products(self, rows: slice, block: slice, dx: Tensor) -> None:
        """Adds the products of the gradient dx of a tile of logits to the operands' gradients."""
        if self.db is not None:
            self.db[block] += dx.sum(0, dtype=self.db.dtype)
        dx = dx.to(self.tiles.operands.h.dtype)
        if self.dh:
            self.dh.add(rows, dx, self.tiles.weight_of(block), first=block.start == 0)
        if self.dw:
            self.dw.add(block, dx.t(), self.tiles.operands.h[rows], first=rows.start == 0)

    def gradients(self) -> Gradients:
        del self.tiles.buffer, self.tiles.kept  # frees their memory before gradients are cast
        b = self.tiles.given.b
        return Gradients(
            self.dh.gradient() if self.dh else None,
            self.dw.gradient() if self.dw else None,
            None if self.db is None or b is None else self.db.to(b.dtype),
            self.dprobs,
        )


class _Sum:
    """One gradient, summed in float32 if it comes in several parts or in another dtype."""

    def __init__(self, like: Tensor, operand: torch.dtype, several: bool, tile: int) -> None:
        self.dtype = like.dtype
        self.elements = product_elements(tile, like.shape[1])
        own = accumulates(like.dtype, operand, several)
        self.total = torch.empty(like.shape, dtype=acc_dtype(operand) if own else like.dtype, device=like.device)

    def add(self, part: slice, a: Tensor, b: Tensor, first: bool) -> None:
        _product(self.total[part], a, b, not first, self.elements)

    def gradient(self) -> Tensor:
        return self.total.to(self.dtype)


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, elements: int) -> None:
    """`out = a @ b`, or `out += a @ b`, summed in out's dtype where that is wider than the operands'.

    Where the GEMM library returns the operands' dtype only, `elements` of the product are computed at a time.
    """
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # no CPU GEMM returns a dtype wider than its operands': each product is rounded to theirs
        for rows in slices_of(len(out), max(1, elements // max(out.shape[1], 1))):
            part = a[rows] @ b
            if accumulate:
                out[rows].add_(part)
            else:
                out[rows].copy_(part)
