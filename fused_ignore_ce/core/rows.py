"""What a backend is given, and what it returns per row. A leaf: it imports nothing of this package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Logits(NamedTuple):
    """Logits and their targets, as the backends take them."""

    x: Tensor  # (B, T, V), or this rank's shard of V
    target: Tensor  # (B * T,) int64, contiguous
    weight: Tensor | None  # (V,)
    probs: Tensor | None  # (B, T, V)


def classes_last(t: Tensor, dim: int) -> Tensor:
    """(*batch, C, *positions), with C at `dim`, as (B, T, C): a view unless several dimensions cannot be merged."""
    if t.dim() == 1:
        return t.view(1, 1, -1)
    if dim == t.dim() - 1:
        return t.unsqueeze(0) if t.dim() == 2 else t.flatten(0, -3)
    rows: Tensor = t.movedim(1, -1)
    return rows.flatten(1, -2)


def classes_back(t: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """The inverse of `classes_last`, for the shape that it was given."""
    if dim == len(shape) - 1:
        return t.view(shape)
    given: Tensor = t.unflatten(1, shape[2:])
    return given.movedim(-1, 1)


class Rows(NamedTuple):
    """The results of N rows of logits; all are 0 (or False) at ignored rows."""

    loss: Tensor  # (N,) cross entropy, without z-loss
    lse: Tensor  # (N,) log(sum(exp(used logits))) in nats
    norm: Tensor  # (3, N) lse as two numbers in the backend's own unit; the sum of the target distribution
    predicted: Tensor  # (N,) int64 class of the largest used logit, the first of equals; empty without statistics
    entropy: Tensor  # (N,) entropy of the softmax in nats; empty without statistics

    @property
    def saved(self) -> Saved:
        return Saved(self.norm, self.entropy)


class Saved(NamedTuple):
    """The results of rows that backward needs."""

    norm: Tensor
    entropy: Tensor | None  # read only where the entropy's own gradient is wanted


class Upstream(NamedTuple):
    """The gradients of a scalar with respect to rows' results; None counts as 0.

    The gradient of a row's loss is `dloss * factor * token_weight`, where None counts as 1 for the latter two.
    """

    dloss: Tensor | None  # (N,) or 0-d
    dlse: Tensor | None = None  # (N,)
    dentropy: Tensor | None = None  # (N,)
    factor: Tensor | None = None  # 0-d
    token_weight: Tensor | None = None  # (N,)


class Block(NamedTuple):
    """A block of the vocabulary: the classes from `first_class` on, of `classes` in all."""

    first_class: int
    classes: int


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_rows(like: Tensor, N: int, with_stats: bool) -> Rows:
    """N rows of zeros, on the device of `like` and in the dtype of its sums."""
    dtype = acc_dtype(like.dtype)
    stats = N if with_stats else 0
    return Rows(
        loss=like.new_zeros(N, dtype=dtype),
        lse=like.new_zeros(N, dtype=dtype),
        norm=like.new_zeros((3, N), dtype=dtype),
        predicted=like.new_zeros(stats, dtype=torch.int64),
        entropy=like.new_zeros(stats, dtype=dtype),
    )


class RowResults(NamedTuple):
    """The results of all rows as an operator returns them. The first three are differentiable."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    predicted: Tensor
    norm: Tensor
    # Results that need all ranks of a group; empty without a group, or where they do not apply.
    target_weight: Tensor  # (N,) class weights of index targets
    likeliest: Tensor  # (N,) int64 class of the largest target probability, with statistics
    block: Tensor  # the fields of this rank's `Block`, on the CPU

    @classmethod
    def of(cls, rows: Rows) -> RowResults:
        """The results of rows whose vocabulary is not sharded."""
        none, place = rows.loss.new_empty(0), torch.empty(0, dtype=torch.int64)
        return cls.of_group(rows, none, none.long(), place)

    @classmethod
    def of_group(cls, rows: Rows, target_weight: Tensor, likeliest: Tensor, place: Tensor) -> RowResults:
        of_rows = (rows.loss, rows.lse, rows.entropy, rows.predicted, rows.norm)
        return cls(*of_rows, target_weight, likeliest, place)

    def constants(self, with_stats: bool) -> tuple[Tensor, ...]:
        """The results that have no gradient; without statistics there is no entropy."""
        return self[3:] if with_stats else self[2:]


RESULTS_SCHEMA = "(" + ", ".join(["Tensor"] * len(RowResults._fields)) + ")"


def fake_results(x: Tensor, N: int, call: Any, weight: Tensor | None, probs: Tensor | None) -> RowResults:
    """Results of the right shapes for tracing. `call` has the fields `with_stats` and `group`."""
    rows = zero_rows(x, N, call.with_stats)
    if call.group is None:
        return RowResults.of(rows)
    none = rows.loss.new_empty(0)
    target_weight = torch.empty_like(rows.loss) if weight is not None and probs is None else none
    likeliest = torch.empty_like(rows.predicted) if probs is not None and call.with_stats else none.long()
    return RowResults.of_group(rows, target_weight, likeliest, torch.empty(2, dtype=torch.int64))


def block_of(place: Tensor) -> Block | None:
    """The `Block` that `RowResults.block` holds; None without a group."""
    return Block(*place.tolist()) if len(place) else None
