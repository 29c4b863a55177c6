"""Evaluates logits and their reductions a tile of rows at a time; backward computes the tiles again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .expression import Expression, Form, evaluate, leaves, substitute
from .recipe import autocast
from .saving import without_memory

#: Bytes of a tile's logits in float32 without a `memory_budget`; and how many tensors of that size share a budget.
TILE_BYTES, TENSORS = 2**26, 8


class _Work(NamedTuple):
    form: Form  # of tensors without memory, which are replaced by those of each tile
    places: list[int]  # the ids of these tensors
    by_rows: list[bool]
    rows: int
    tile: int

    def tile_of(self, tensors: list[Tensor], start: int) -> list[Tensor]:
        stop = min(start + self.tile, self.rows)
        return [t[start:stop] if sliced else t for t, sliced in zip(tensors, self.by_rows, strict=True)]

    def value(self, tile: list[Tensor]) -> list[Tensor]:
        found = evaluate(substitute(self.form, dict(zip(self.places, tile, strict=True)), False), {})
        return [found] if isinstance(found, Tensor) else list(found)

    @property
    def starts(self) -> range:
        return range(0, max(1, self.rows), self.tile)


def rows_of_tile(classes: int, memory_budget: int | None) -> int:
    size = TILE_BYTES if memory_budget is None else memory_budget // TENSORS
    return max(1, size // (4 * max(classes, 1)))


def _work_on(form: Form, memory_budget: int | None) -> tuple[_Work, list[Tensor]]:
    """The work for a form, and the tensors that its tiles are taken of, whose first dimension is that of the rows."""
    product, found = form.product, {id(t): (t, sliced) for t, sliced in leaves(form)}
    rows = product.rows
    tensors = [t.reshape(rows, t.shape[-1]) if sliced else t for t, sliced in found.values()]
    shapes = [without_memory(t) for t in tensors]
    work = _Work(
        substitute(form, dict(zip(found, shapes, strict=True))),
        [id(t) for t in shapes],
        [sliced for _, sliced in found.values()],
        rows,
        rows_of_tile(product.weight.shape[0], memory_budget),
    )
    return work, tensors


def all_logits(form: Form, memory_budget: int | None) -> Tensor:
    """The logits of a form, from the same tiles as their reductions: a logit is the same number in both."""
    product = form.product
    if product.layout != "plain" or not product.rows:
        found = form.logits()
    else:
        work, tensors = _work_on(form, memory_budget)
        (found,) = work.value(work.tile_of(tensors, 0))
        if work.tile < work.rows:
            first, found = found, found.new_empty(work.rows, found.shape[-1])
            found[: work.tile] = first
            for start in work.starts[1:]:
                (found[start : start + work.tile],) = work.value(work.tile_of(tensors, start))
        found = found.view(*product.hidden.shape[:-1], found.shape[-1])
    return found.movedim(-1, 1) if form.classes_second else found


def by_tiles(reduction: Expression, memory_budget: int | None) -> Tensor | tuple[Tensor, ...]:
    """The value of an expression whose last operation reduces the vocabulary, with the rows' dimensions in front."""
    lead = reduction.product.hidden.shape[:-1]
    work, tensors = _work_on(reduction, memory_budget)
    values = _Tiles.apply(work, *tensors)
    values = tuple(value.view(*lead, *value.shape[1:]) for value in values)
    return values[0] if len(values) == 1 else values


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Any:
        ctx.work = work
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        tiles = [work.value(work.tile_of(list(tensors), start)) for start in work.starts]
        values = tuple(_joined(parts) for parts in zip(*tiles, strict=True))
        ctx.mark_non_differentiable(*(v for v in values if not v.is_floating_point()))
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        work, tensors = ctx.work, list(ctx.saved_tensors)
        needed = ctx.needs_input_grad[1:]
        given = [(i, g) for i, g in enumerate(upstream) if g is not None]
        sums: list[Any] = [[] if sliced else None for sliced in work.by_rows]
        for start in work.starts if given else ():
            tile = [t.detach().requires_grad_(n) for t, n in zip(work.tile_of(tensors, start), needed, strict=True)]
            with torch.enable_grad():
                values = work.value(tile)
            pairs = [(values[i], g[start : start + work.tile]) for i, g in given if values[i].requires_grad]
            wanted = [t for t, n in zip(tile, needed, strict=True) if n]
            values, gradients = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(values, wanted, gradients, materialize_grads=True))
            for i, n in enumerate(needed):
                if n:
                    _add(sums, i, next(found))
        grads = []
        for t, n, total in zip(tensors, needed, sums, strict=True):
            if isinstance(total, list):
                total = _joined(total) if total else None
            grads.append(total.to(t.dtype) if n and total is not None else None)
        return None, *grads


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts of all tiles. Autocast's `cat` refuses some dtypes, such as float16 where it is for bfloat16."""
    with autocast((parts[0].device.type, None)):
        return torch.cat(tuple(parts))


def _add(sums: list[Any], i: int, gradient: Tensor) -> None:
    """Adds the gradient of a tile: gradients of rows are collected, others are summed, in float32 at least."""
    if isinstance(sums[i], list):
        sums[i].append(gradient)
    elif sums[i] is None:
        sums[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    else:
        sums[i] += gradient
