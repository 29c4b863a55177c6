"""Computes for every token what trainers need, without logits: log-probability, entropy and three statistics."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..deferred import defer
from ..losses.log_probs import fused_linear_log_probs
from .summed_log_probs import summed_log_probs


class Head(NamedTuple):
    """Hidden states (N, D), the head's weight (V, D) and bias (V), and the operations on their product.

    The logits are `softcap * tanh(logit_scale * x / softcap) / temperature`, without a softcap
    `logit_scale * x / temperature`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float

    def logits(self) -> Any:
        """The logits in float32, deferred: what reduces them is computed a tile of tokens at a time."""
        logits: Any = defer(self.hidden, self.weight, self.bias).float() * self.logit_scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits / self.temperature


class PerToken(NamedTuple):
    """Results of N tokens, (N,) each; None where not wanted. Only the first two have gradients."""

    log_probs: Tensor
    #: The entropy of the distribution, in nats.
    entropy: Tensor | None
    #: log(sum(p**2)) of the distribution.
    log_sum_sq_probs: Tensor | None
    #: The mean of the logits.
    mean_logits: Tensor | None
    #: Whether the target is the likeliest class.
    is_top1: Tensor | None


def per_token(head: Head, targets: Tensor, names: Collection[str], summed: bool, options: dict[str, Any]) -> PerToken:
    """The log-probabilities of targets (N,), none of them ignored, and the other fields that `names` has.

    Args:
        head: where the logits come from.
        targets: int64 class indices.
        names: the fields of `PerToken` that are wanted.
        summed: whether the loss is expected to be the sum of the log-probabilities times a number. The gradients are
            then cheaper, and right even if the loss is another one; the entropy has no gradient.
        options: `memory_budget`, `logits_dtype` and `backend`, as in `fused_linear_log_probs`.
    """
    given: dict[str, Any] = {"linear_bias": head.bias, **options}
    given.update(softcap=head.softcap, logit_scale=head.logit_scale, temperature=head.temperature)
    entropy = None
    if summed:
        log_probs, stats = summed_log_probs(head.hidden, head.weight, targets, **given)
        entropy = stats.entropy
    elif "entropy" in names:
        log_probs, entropy, stats = fused_linear_log_probs(
            head.hidden, head.weight, targets, return_entropy=True, return_stats=True, **given
        )
    else:
        log_probs, stats = fused_linear_log_probs(head.hidden, head.weight, targets, return_stats=True, **given)
    log_sum_sq_probs = mean_logits = None
    with torch.no_grad():
        if "log_sum_sq_probs" in names:
            log_sum_sq_probs = (2 * head.logits().log_softmax(-1)).logsumexp(-1)
        if "mean_logits" in names:
            mean_logits = _mean_logits(head)
    is_top1 = stats.correct if "is_top1" in names else None
    return PerToken(log_probs, entropy if "entropy" in names else None, log_sum_sq_probs, mean_logits, is_top1)


def _mean_logits(head: Head) -> Tensor:
    """The mean over the vocabulary. Without a softcap, it is the product of hidden states and the head's mean row."""
    if head.softcap is not None:
        mean: Tensor = head.logits().mean(-1)
        return mean
    row = head.weight.mean(0, dtype=torch.float32)
    mean = torch.cat([torch.mv(tile.float(), row) for tile in head.hidden.split(4096)])
    if head.bias is not None:
        mean = mean + head.bias.mean(dtype=torch.float32)
    return mean * (head.logit_scale / head.temperature)
