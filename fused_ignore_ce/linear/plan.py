"""Chooses the tile of logits that exists at a time, by arithmetic on sizes.

A tile of logits is `rows` tokens by `classes` of the vocabulary. Three kinds of tiles, from fastest to leanest:

- one block, N x V: three GEMMs (logits, dH, dW).
- token chunks, rows x V: the same GEMMs in parts. dW is summed over the chunks, in float32: 4VD bytes, unless the
  gradient itself is float32, and 8VD bytes moved per chunk.
- vocabulary blocks, N x classes: one sweep over the blocks for the softmax's normaliser, another for the gradients,
  which computes the logits again: four GEMMs. Every block of dW is complete at once; dH is summed over the blocks. If
  memory allows, the logits of some blocks are kept from the first sweep to the second, and only the others are
  computed again: between three and four GEMMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..backends.blocks import BLOCK_ELEMENTS, BLOCK_TEMPORARIES
from ..core.options import ReductionOptions, budget_bytes, check_logits_dtype, floating_dtype
from ..core.unknown_keywords import explains_keywords
from .machines import MACHINES

ONE_BLOCK, TOKEN_CHUNKS, VOCABULARY_BLOCKS = "one block", "token chunks", "vocabulary blocks"

#: A plan is as good as another if its predicted time is at most this much longer; the leaner of them is taken. A budget
#: says what memory may be used, so that more of it is used for time.
NEAR_ENOUGH, NEAR_ENOUGH_WITHIN_BUDGET = 1.05, 1.01

#: Bytes per row of vectors of N elements: targets, losses, normalisers, scales, and their copies.
ROW_BYTES = 128

#: Bytes per row and vocabulary block, or per row and rank: the sums of every block, and what merging them takes.
PART_BYTES = 48

#: Elements of a product that is summed into another dtype at a time, at most; see `product_elements`.
PRODUCT_ELEMENTS = 1 << 19


class LinearPlan(NamedTuple):
    """How a linear loss is computed, see `plan_linear_loss`.

    Attributes:
        plan: "one block", "token chunks" or "vocabulary blocks".
        chunk: tokens of a chunk; classes of a block for "vocabulary blocks".
        bytes: scratch at its peak, beside the tensors of the caller and the gradients.
        kept: blocks of the vocabulary whose logits are kept from the first sweep to the second, and not computed again.
    """

    plan: str
    chunk: int
    bytes: int
    kept: int = 0

    def tile(self, N: int, V: int) -> tuple[int, int]:
        """(rows, classes) of the logits that exist at a time."""
        return (N, self.chunk) if self.plan == VOCABULARY_BLOCKS else (self.chunk, V)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products. CPUs multiply float16 a hundred times slower than float32."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def product_elements(tile: int, D: int) -> int:
    """Elements of a product at a time where it is summed into another dtype and the GEMM library cannot do it (CPUs).

    `tile` is the number of logits of a tile: smaller tiles are for smaller budgets.
    """
    return max(min(PRODUCT_ELEMENTS, tile), D)


@dataclass(frozen=True)
class Sizes:
    """All that the choice of a plan depends on. `N` rows are kept."""

    N: int
    V: int
    D: int
    dtype: torch.dtype  # of the operands of the GEMMs
    input_dtype: torch.dtype  # of input and its gradient
    weight_dtype: torch.dtype  # of linear_weight and its gradient
    device: str
    dinput: bool  # whether input wants a gradient
    dweight: bool  # whether linear_weight does
    gathered: bool  # whether some rows are ignored, so that the kept ones are a copy
    recompute: bool  # whether gradients wait for backward, which needs the logits once more
    probs: bool
    wide: bool = False  # whether logits of 16-bit operands are float32
    ranks: int = 1  # that share the vocabulary; V is the size of this rank's shard

    @property
    def sums(self) -> torch.dtype:
        """The dtype in which chunks or blocks are summed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def tile(self, rows: int, classes: int) -> int:
        """The bytes of a tile of logits."""
        acc = self.sums.itemsize * self.wide  # with float32 logits, their gradient is cast for the products
        return rows * classes * (self.dtype.itemsize + acc)

    def most_kept(self, classes: int, memory_budget: int | None) -> int:
        """How many blocks of the vocabulary can keep their logits within the budget, beside the one in work."""
        if memory_budget is None or self.recompute or self.ranks > 1 or not (self.dinput or self.dweight):
            return 0
        rest = (memory_budget - self.bytes(self.N, classes)) // max(self.tile(self.N, classes), 1)
        return max(0, min(rest, -(-self.V // classes) - 1))

    def bytes(self, rows: int, classes: int, kept: int = 0) -> int:
        """The scratch memory at its peak with tiles of this size, in bytes."""
        N, V, D = self.N, self.V, self.D
        size, acc = self.dtype.itemsize, self.sums.itemsize
        blocks = -(-V // classes)
        tile = self.tile(rows, classes) * (1 + kept)
        workspace = 0
        if self.device != "cuda":
            temporaries = BLOCK_TEMPORARIES + 2 * self.probs
            workspace = temporaries * acc * min(rows * classes, max(BLOCK_ELEMENTS, classes))
            workspace += product_elements(rows * classes, D) * (size + acc) if size < acc else 0
        if self.wide and self.device != "cuda":
            workspace += rows * D * acc + (product_elements(rows * classes, D) + rows * classes) * acc
        weight = min(classes, V) * D * size if self.weight_dtype != self.dtype else 0
        gathered = self.input_dtype.itemsize * self.gathered * (1 + self.dinput)
        hidden = N * D * (gathered + size * (self.input_dtype != self.dtype))
        dweight = V * D * acc if self.dweight and accumulates(self.weight_dtype, self.dtype, rows < N) else 0
        dinput = N * D * acc if self.dinput and accumulates(self.input_dtype, self.dtype, blocks > 1) else 0
        parts = N * PART_BYTES * (blocks * (blocks > 1) + self.ranks * (self.ranks > 1))
        if self.ranks > 1 and self.dinput and self.input_dtype.itemsize < 4:
            dinput += N * D * acc  # summed over the ranks in float32
        return tile + workspace + weight + hidden + dweight + dinput + parts + N * ROW_BYTES

    def seconds_of(self, plan: LinearPlan) -> float:
        """The predicted time of forward and backward by this plan."""
        if plan.plan == VOCABULARY_BLOCKS:
            return self.seconds(self.N, plan.chunk, plan.kept)
        return self.seconds(plan.chunk, self.V)

    def seconds(self, rows: int, classes: int, kept: int = 0) -> float:
        """The predicted time of forward and backward."""
        N, V, D = self.N, self.V, self.D
        size, acc = self.dtype.itemsize, self.sums.itemsize
        machine = MACHINES.get((self.device, size), MACHINES["cuda", size])
        chunks, blocks = -(-N // rows), -(-V // classes)
        gradients = self.dinput + self.dweight
        again = blocks > 1 or self.recompute or (self.ranks > 1 and chunks > 1)
        gemms = 1 + gradients + bool(gradients and again) * (1 - kept / max(blocks, 1))
        moved = chunks * (gemms - self.dweight) * V * D * size  # the weight, read by the other GEMMs
        moved += self.dweight * V * D * (2 * acc * chunks if chunks > 1 else size)
        moved += blocks * N * D * (gemms * size + (2 * acc if self.dinput and blocks > 1 else 0))
        return (
            2 * N * V * D * gemms / machine.flops
            + moved / machine.bandwidth
            + self.bytes(rows, classes, kept) / machine.touch
            + N * V * (1 + bool(gradients)) / machine.elements
            + chunks * blocks * machine.tile
        )


def accumulates(gradient: torch.dtype, operand: torch.dtype, several: bool) -> bool:
    """Whether a narrow gradient is summed in a wider tensor: if it has several terms, or not the operands' dtype."""
    wide = gradient.itemsize >= 4
    return not wide and (several or gradient != operand)


def _counts(most: int) -> Iterator[int]:
    """1, and numbers in steps of about a tenth, up to `most`."""
    count = 1
    while count < most:
        yield count
        count = max(count + 1, count * 11 // 10)
    yield most


def _part(size: int, count: int) -> int:
    """The size of each of `count` parts; above 64, it is rounded up to a multiple of 64, which GEMMs like."""
    part = -(-size // count)
    return min(size, -(-part // 64) * 64) if part > 64 else part


@lru_cache(maxsize=64)  # called by the loss, and again by its operators
def too_little(least: int, N: int, V: int, D: int, dtype: torch.dtype, memory_budget: int | None) -> ValueError:
    return ValueError(
        f"memory_budget: expected at least {least} bytes ({least / 2**20:.3g} MiB) for {N} kept tokens, {V} classes "
        f"and {D} features in {dtype}, got {memory_budget}"
    )


def choose(sizes: Sizes, memory_budget: int | None) -> LinearPlan:
    """Takes the leanest of all plans whose predicted time is near the fastest's, within the budget if there is one."""
    N, V = max(sizes.N, 1), max(sizes.V, 1)
    tiles = [(ONE_BLOCK, N, V, 0)]
    tiles += [(TOKEN_CHUNKS, rows, V, 0) for rows in sorted({_part(N, count) for count in _counts(N)}) if rows < N]
    for width in sorted({_part(V, c) for c in _counts(V)}):
        if width < V:
            tiles += [(VOCABULARY_BLOCKS, N, width, kept) for kept in {0, sizes.most_kept(width, memory_budget)}]
    known = [(*tile, sizes.bytes(*tile[1:])) for tile in tiles]
    fitting = [tile for tile in known if memory_budget is None or tile[-1] <= memory_budget]
    if not fitting:
        least = min(size for *_, size in known)
        raise too_little(least, sizes.N, sizes.V, sizes.D, sizes.dtype, memory_budget)
    times = [sizes.seconds(*tile) for _, *tile, _ in fitting]
    limit = min(times) * (NEAR_ENOUGH if memory_budget is None else NEAR_ENOUGH_WITHIN_BUDGET)
    near = [tile for tile, time in zip(fitting, times, strict=True) if time <= limit]
    plan, rows, classes, kept, size = min(near, key=lambda tile: tile[-1])
    return LinearPlan(plan, classes if plan == VOCABULARY_BLOCKS else rows, size, kept)


@explains_keywords
def plan_linear_loss(
    num_tokens: int,
    num_classes: int,
    num_features: int,
    *,
    num_ignored: int = 0,
    dtype: torch.dtype | str = torch.bfloat16,
    weight_dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cuda",
    memory_budget: int | str | None = None,
    input_grad: bool = True,
    weight_grad: bool = True,
    reduction: str = "mean",
    logits_dtype: torch.dtype | None = None,
) -> LinearPlan:
    """What `fused_linear_cross_entropy` does for these sizes: (plan, chunk, bytes, kept).

    Args:
        num_tokens: N, rows of input.
        num_ignored: how many of them are ignored.
        num_classes: V, rows of linear_weight.
        num_features: D.
        dtype: of the matrix products: input's or, under autocast, autocast's; a torch.dtype or its name ("bf16",
            "bfloat16").
        weight_dtype: of linear_weight, where it is another: float32 parameters under autocast.
        device: where it runs; nothing is allocated there.
        memory_budget: bytes of scratch beside the caller's tensors and the gradients, an int or a string such as
            "512MiB" (2^20 bytes each) or "512MB" (10^6); None for no limit.
        input_grad: whether input wants a gradient.
        weight_grad: whether linear_weight wants a gradient.
        reduction: "none" computes gradients in backward, from logits computed again.
        logits_dtype: torch.float32 for logits that are not rounded to 16 bits, as in `fused_linear_cross_entropy`.

    Returns:
        plan: "one block" (the logits of all kept tokens at once), "token chunks" (of some tokens at a time, dW summed
        over the chunks in float32) or "vocabulary blocks" (of some classes at a time, twice). chunk: tokens, or
        classes of a block. bytes: scratch at its peak. kept: blocks of the vocabulary whose logits are not computed
        again. Of all plans, the leanest is taken whose predicted time is within 5% of the fastest's; of those that fit
        a budget, within 1%.

    Raises:
        ValueError: no plan fits the budget (the message names the smallest that works); a negative size, more ignored
            tokens than tokens, or an unknown reduction.
        TypeError: a memory_budget that is no number of bytes, a dtype that is not floating, an unknown keyword.

    Examples:
        >>> plan_linear_loss(8192, 128256, 4096).plan
        'one block'
        >>> plan_linear_loss(8192, 128256, 4096, memory_budget=2**29).plan
        'vocabulary blocks'
    """
    for name, size in (("num_tokens", num_tokens), ("num_classes", num_classes), ("num_features", num_features)):
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more, got {size}")
    if not 0 <= num_ignored <= num_tokens:
        raise ValueError(f"num_ignored: expected 0 to num_tokens={num_tokens}, got {num_ignored}")
    dtype = floating_dtype("dtype", dtype)
    check_logits_dtype(logits_dtype, dtype)
    ReductionOptions(reduction).checked()
    device = torch.device(device)
    operand = operand_dtype(dtype, device)
    weight_dtype = dtype if weight_dtype is None else floating_dtype("weight_dtype", weight_dtype)
    sizes = Sizes(
        N=num_tokens - num_ignored, V=num_classes, D=num_features, dtype=operand, input_dtype=dtype,
        weight_dtype=weight_dtype, device=device.type, dinput=input_grad, dweight=weight_grad,
        gathered=num_ignored > 0, recompute=reduction == "none" or dtype == torch.float16, probs=False,
        wide=logits_dtype not in (None, operand),
    )  # fmt: skip
    return choose(sizes, budget_bytes(memory_budget))
