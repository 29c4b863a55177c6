"""From rows to what the caller gets: which rows count, what "mean" divides by, the loss's dtype, statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossStats(NamedTuple):
    """What a pass over the logits also knows. Detached; 0 (False) at ignored rows."""

    #: Rows that were not ignored; 0-d int64.
    num_tokens: Tensor
    #: log(sum(exp(used logits))) in nats; target-shaped, float32 (float64 for float64 input).
    lse: Tensor
    #: Whether the largest logit (the first of them on ties) is the target's; target-shaped bool.
    correct: Tensor
    #: Entropy of the softmax in nats; target-shaped, float32 (float64 for float64 input).
    entropy: Tensor


def row_targets(
    target: Tensor | None, probs: Tensor | None, ids: tuple[int, ...], token_weight: Tensor | None, with_stats: bool
) -> Tensor:
    """Targets as the backends want them: one int64 a row, contiguous, `ids[0]` for every ignored row.

    There is one of target, with a number a row, and `probs` (..., V). With probabilities, what counts as correct is
    the class of the largest.
    """
    if probs is None:
        assert target is not None
        index = target.reshape(-1).long().contiguous()
    elif with_stats and probs.shape[-1]:
        index = probs.detach().argmax(-1).reshape(-1)
    else:
        index = torch.zeros(probs.shape[:-1].numel(), dtype=torch.int64, device=probs.device)
    ignored = None
    for extra in ids[1:]:
        ignored = index == extra if ignored is None else ignored | (index == extra)
    if token_weight is not None:
        unweighted = token_weight.detach().reshape(-1) == 0
        ignored = unweighted if ignored is None else ignored | unweighted
    return index if ignored is None else index.masked_fill(ignored, ids[0])


def divisor(kept: Tensor, target_weight: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """What "mean" divides by: the kept rows, each counted with its target's class weight and its token weight."""
    if target_weight is not None:
        share = torch.where(kept, target_weight.to(torch.promote_types(target_weight.dtype, torch.float32)), 0.0)
        return (share if token_weight is None else share * token_weight).sum()
    return kept.sum() if token_weight is None else token_weight.sum()


def loss_dtype(input: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = input.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    if torch.is_autocast_enabled(input.device.type) and dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return dtype
