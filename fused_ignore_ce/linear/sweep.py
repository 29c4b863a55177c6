"""The walk over the tiles of a plan: logits by GEMM, the loss's kernels on them, gradients by GEMM.

One buffer holds the logits of every tile in turn, and then their gradient. The kernels are those of the logits loss;
a tile that has only a block of the vocabulary leaves sums, which are merged when its rows are complete: over the
blocks, and over the ranks where the vocabulary is sharded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import RowOptions, implementation
from ..torch_backend import combine
from .plan import LinearPlan, accumulates, product_elements


class Operands(NamedTuple):
    """The problem: rows h with logits h @ w.T + b. Ignored rows are zero in h."""

    h: Tensor  # (N, D)
    w: Tensor  # (V, D)
    b: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    weight: Tensor | None  # (V,)
    probs: Tensor | None  # (N, V)


class Rows(NamedTuple):
    """Per row, what the forward kernels give."""

    loss: Tensor
    lse: Tensor
    mass: Tensor
    correct: Tensor
    entropy: Tensor


class Gradients(NamedTuple):
    """Of the operands; None where not wanted."""

    h: Tensor | None
    w: Tensor | None
    b: Tensor | None
    probs: Tensor | None


def _slices(size: int, step: int) -> list[slice]:
    """At least one, so that empty sums are made too."""
    return [slice(start, min(start + step, size)) for start in range(0, max(size, 1), max(step, 1))]


def _product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, elements: int) -> None:
    """`out = a @ b`, or `out += a @ b`, summed in out's dtype where that is wider than the operands'.

    Where the GEMM library returns the operands' dtype only, so many `elements` are computed at a time.
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
    else:  # no CPU GEMM returns a dtype wider than its operands': what is added comes rounded to theirs
        for rows in _slices(len(out), max(1, elements // max(out.shape[1], 1))):
            part = a[rows] @ b
            if accumulate:
                out[rows].add_(part)
            else:
                out[rows].copy_(part)


class _Sum:
    """A gradient that comes in parts."""

    def __init__(self, like: Tensor, operand: torch.dtype, sums: torch.dtype, several: bool, tile: int) -> None:
        self.dtype = like.dtype
        self.elements = product_elements(tile, like.shape[1])
        own = accumulates(like.dtype, operand, several)
        self.total = torch.empty(like.shape, dtype=sums if own else like.dtype, device=like.device)

    def add(self, part: slice, a: Tensor, b: Tensor, first: bool) -> None:
        _product(self.total[part], a, b, not first, self.elements)

    def gradient(self) -> Tensor:
        return self.total.to(self.dtype)


def sweep(
    operands: Operands,
    options: RowOptions,
    plan: LinearPlan,
    *,
    dtype: torch.dtype,
    backend: str,
    with_stats: bool = False,
    saved: tuple[Tensor, Tensor] | None = None,
    dloss: Tensor | None = None,
    wanted: tuple[bool, bool, bool, bool] = (False, False, False, False),
    shard: Any = None,
) -> tuple[Any, Gradients]:
    """Losses of all rows, unless `saved` has their (lse, mass); the gradients of `sum(dloss * loss)` that are wanted.

    `dtype` is that of the GEMMs; gradients have their operands' dtypes. With a `shard` (`distributed.Shard`), the
    operands are its own, the rows `distributed.Merged`, and dh is this rank's share.
    """
    kernels = implementation(backend, operands.h.device)
    h, w = operands.h.to(dtype), operands.w
    N, V = len(h), len(w)
    rows_a_chunk, classes_a_block = plan.tile(N, V)
    chunks, blocks = _slices(N, rows_a_chunk), _slices(V, classes_a_block)
    buffer = h.new_empty(min(rows_a_chunk, N) * min(classes_a_block, V))
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    if len(blocks) == 1:
        w = w.to(dtype)
    tiles = _Tiles(operands._replace(h=h, w=w), options, kernels, buffer, with_stats, shard)

    want_h, want_w, want_b, want_probs = wanted
    dh = _Sum(operands.h, dtype, sums, len(blocks) > 1, len(buffer)) if want_h else None
    dw = _Sum(operands.w, dtype, sums, len(chunks) > 1, len(buffer)) if want_w else None
    db = torch.zeros(V, dtype=sums, device=h.device) if want_b else None
    dprobs = torch.empty_like(operands.probs) if want_probs and operands.probs is not None else None
    found = None
    first_pass = saved is None
    if shard is not None and saved is None:
        found = tiles.losses_of_all_ranks(chunks, blocks)
        saved = (found.lse, found.mass)
    for rows in chunks:
        if saved is None:
            part = tiles.losses(rows, blocks)
            found = _joined(found, part, rows, N)
            lse, mass = part.lse, part.mass
        else:
            lse, mass = saved[0][:, rows].contiguous(), saved[1][rows]
        if not any(wanted):
            continue
        assert dloss is not None
        for block in blocks:
            w_block = w[block].to(dtype)
            # Logits that are in the buffer from the first pass.
            kept = first_pass and len(blocks) == 1 and (saved is None or len(chunks) == 1)
            x = tiles.tile(rows, block) if kept else tiles.logits(rows, block, w_block)
            tiles.differentiate(x, rows, block, dloss[rows], lse, mass, dprobs)
            if dh:
                dh.add(rows, x, w_block, first=block.start == 0)
            if dw:
                dw.add(block, x.t(), h[rows], first=rows.start == 0)
            if db is not None:
                db[block] += x.sum(0, dtype=sums)
    del buffer, tiles
    gradients = Gradients(
        dh.gradient() if dh else None,
        dw.gradient() if dw else None,
        None if db is None or operands.b is None else db.to(operands.b.dtype),
        dprobs,
    )
    return found, gradients


def _joined(found: Rows | None, part: Rows, rows: slice, N: int) -> Rows:
    """`found` with a chunk's rows written into it.

    Copied, not collected: small tensors that stay between the large temporaries of one chunk and the next would
    leave holes in the heap too small for the latter, and glibc's heap grew by a temporary a chunk.
    """
    if rows == slice(0, N):
        return part
    if found is None:
        found = Rows(*(field.new_empty((*field.shape[:-1], N if field.shape[-1] else 0)) for field in part))
    for whole, field in zip(found, part, strict=True):
        if whole.shape[-1]:
            whole[..., rows] = field
    return found


class _Tiles:
    """Tiles of logits in the buffer, and the kernels' calls on them."""

    def __init__(
        self, operands: Operands, options: RowOptions, kernels: Any, buffer: Tensor, with_stats: bool, shard: Any
    ) -> None:
        self.operands, self.kernels, self.buffer, self.with_stats = operands, kernels, buffer, with_stats
        self.options, self.shard = options._asdict(), shard
        self.first_class: int = 0 if shard is None else shard.first_class
        self.classes: int = len(operands.w) if shard is None else shard.classes

    def tile(self, rows: slice, block: slice) -> Tensor:
        """The part of the buffer that holds this tile, (rows, classes)."""
        n, v = rows.stop - rows.start, block.stop - block.start
        return self.buffer[: n * v].view(n, v)

    def logits(self, rows: slice, block: slice, w_block: Tensor) -> Tensor:
        out, h, b = self.tile(rows, block), self.operands.h[rows], self.operands.b
        if b is None:
            return torch.mm(h, w_block.t(), out=out)
        return torch.addmm(b[block].to(h.dtype), h, w_block.t(), out=out)

    def _arguments(self, rows: slice, block: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(target, weight, probs) of a tile."""
        _, _, _, target, weight, probs = self.operands
        return (
            target[rows],
            None if weight is None else weight[block],
            None if probs is None else probs[rows, block].unsqueeze(0),
        )

    def losses(self, rows: slice, blocks: list[slice]) -> Rows:
        if len(blocks) == 1:
            x = self.logits(rows, blocks[0], self.operands.w)
            arguments = self._arguments(rows, blocks[0])
            return Rows(*self.kernels.forward(x.unsqueeze(0), *arguments, **self.options, with_stats=self.with_stats))
        options = {name: self.options[name] for name in ("ignore_index", "z_loss")}
        parts = self._sums(rows, blocks)
        return Rows(*self.kernels.merge(self.operands.target[rows], parts, **options, with_stats=self.with_stats))

    def losses_of_all_ranks(self, chunks: list[slice], blocks: list[slice]) -> Any:
        """Of all rows, from the sums of every rank's shard."""
        from ..distributed import merge

        # Written into place, see `_joined`.
        parts = self.kernels.new_parts(self.operands.h.new_empty((1, len(self.operands.h), 0)), 1, self.with_stats)
        for rows in chunks:
            for whole, part in zip(parts, combine(self._sums(rows, blocks)), strict=True):
                if whole.shape[-1]:
                    whole[..., rows] = part
        _, _, _, target, weight, probs = self.operands
        options = {name: self.options[name] for name in ("ignore_index", "z_loss")}
        return merge(
            self.shard, parts, target, weight, probs,
            kernels=self.kernels, **options, with_stats=self.with_stats,
        )  # fmt: skip

    def _sums(self, rows: slice, blocks: list[slice]) -> tuple[Tensor, Tensor]:
        """What the kernels leave of every block."""
        parts = None
        for i, block in enumerate(blocks):
            x = self.logits(rows, block, self.operands.w[block].to(self.operands.h.dtype)).unsqueeze(0)
            parts = parts or self.kernels.new_parts(x, len(blocks), self.with_stats)
            self.kernels.forward_part(
                x,
                *self._arguments(rows, block),
                **self.options,
                parts=parts,
                part=i,
                first_class=self.first_class + block.start,
                classes=self.classes,
                with_stats=self.with_stats,
            )
        assert parts is not None
        return parts

    def differentiate(
        self, x: Tensor, rows: slice, block: slice, dloss: Tensor, lse: Tensor, mass: Tensor, dprobs: Tensor | None
    ) -> None:
        """Overwrites the logits x with their gradient, and writes that of the probabilities."""
        self.kernels.backward(
            dloss,
            x.unsqueeze(0),
            *self._arguments(rows, block),
            lse,
            mass,
            **self.options,
            dx=x.unsqueeze(0),
            dprobs=None if dprobs is None else dprobs[rows, block].unsqueeze(0),
            first_class=self.first_class + block.start,
            classes=self.classes,
        )
