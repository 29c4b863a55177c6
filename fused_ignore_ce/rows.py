"""What a backend is given, and what it returns per row. A leaf: it imports nothing of ours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Logits(NamedTuple):
    """Logits and their targets, as the backends take them."""

    x: Tensor  # (B, T, V), or this rank's shard of V
    target: Tensor  # (B * T,) int64, contiguous
    weight: Tensor | None  # (V,)
    probs: Tensor | None  # (B, T, V)


class Rows(NamedTuple):
    """The results of N rows of logits; all are 0 (or False) at ignored rows."""

    loss: Tensor  # (N,) cross entropy, without z-loss
    lse: Tensor  # (N,) log(sum(exp(used logits))) in nats
    shift: Tensor  # (2, N) the same as an unevaluated sum of two numbers, in the backend's own unit
    mass: Tensor  # (N,) the sum of the target distribution: 1 without class weights
    predicted: Tensor  # (N,) int64 class of the largest used logit, the first of equals; empty without statistics
    entropy: Tensor  # (N,) entropy of the softmax in nats; empty without statistics

    @property
    def saved(self) -> Saved:
        return Saved(self.shift, self.mass, self.entropy)


class Saved(NamedTuple):
    """The results of rows that backward needs."""

    shift: Tensor
    mass: Tensor
    entropy: Tensor  # read only where the entropy's own gradient is wanted


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
        shift=like.new_zeros((2, N), dtype=dtype),
        mass=like.new_zeros(N, dtype=dtype),
        predicted=like.new_zeros(stats, dtype=torch.int64),
        entropy=like.new_zeros(stats, dtype=dtype),
    )
