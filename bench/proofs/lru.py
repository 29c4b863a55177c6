"""Simulates a least-recently-used cache, to tell how often the second read of a row misses the L2 cache.

One pass over the logits reads a row twice: for its sums, and for its gradient, which it also writes. Between the two
reads of a logit, all rows in flight move data through the cache. This is least for the row's last classes, so a second
walk that starts there hits more often than one that starts at the first class. Rows are in every phase at once, as in
the middle of a long launch. All rows take turns, and move one block each.

The model is pessimistic in that it ignores hints (`evict_first`, `evict_last`). It is optimistic in that a real cache
is not fully associative and, on an A100 and later, consists of two halves. So predictions count only a share of the
cache, which is fitted to published times (`roof.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from functools import cache
from math import ceil


class Cache:
    """Keeps the `capacity` blocks that were accessed last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[Hashable, None] = OrderedDict()

    def access(self, block: Hashable) -> bool:
        """Returns whether the block was in the cache, and puts it there."""
        hit = block in self._blocks
        self._blocks[block] = None
        self._blocks.move_to_end(block)
        if len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)
        return hit


def accesses(
    row: int, blocks: int, in_place: bool, backwards: bool, kept: int = 0
) -> Iterator[tuple[tuple[int | str, ...], bool]]:
    """The accesses of one pass to a row, in order: (block, whether it is read). The first `kept` stay on the chip."""
    for block in range(blocks):
        yield (row, block), True
    for block in reversed(range(blocks)) if backwards else range(blocks):
        if block >= kept:
            yield (row, block), True
        yield ((row, block) if in_place else (row, block, "gradient")), False


@cache
def reads(
    rows: int, row_bytes: int, cache_bytes: int, in_place: bool, backwards: bool, again: float = 1.0, blocks: int = 32
) -> float:
    """Reads of every logit from device memory, between 1 and 2, with `rows` rows in flight.

    `in_place`: the gradient overwrites the logits. `backwards`: the second walk starts at the last class. `again`: the
    share of a row that is read a second time; the rest stays on the chip.
    """
    twice = ceil(again * blocks)
    cache = Cache(int(cache_bytes * blocks / row_bytes))
    numbers = iter(range(4 * rows))
    length = len(list(accesses(0, blocks, in_place, backwards, blocks - twice)))
    walks = []
    for slot in range(rows):
        walk = accesses(next(numbers), blocks, in_place, backwards, blocks - twice)
        for _ in range(length * slot // rows):
            next(walk)  # so that rows are in every phase
        walks.append(walk)

    # Not counted: each slot's first row, which began in the middle, and its second, which met a cache still filling.
    counted = range(2 * rows, 3 * rows)
    missed = finished = 0
    while finished < 3 * rows:
        for slot, walk in enumerate(walks):
            step = next(walk, None)
            if step is None:
                finished += 1
                walks[slot] = accesses(next(numbers, -1), blocks, in_place, backwards, blocks - twice)
                continue
            block, read = step
            hit = cache.access(block)
            missed += read and not hit and block[0] in counted
    return 1 + (missed / len(counted) - blocks) * again / twice
