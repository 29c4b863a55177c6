"""The reference: every formula once, in plain differentiable PyTorch, with no regard for memory or speed.

It computes in the dtype of its input; with float64, other implementations can be judged by it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The loss of every row, and its statistics."""

    loss: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor


def used_logits(x: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """`softcap * tanh(logit_scale * x / softcap)`, or `logit_scale * x` without a cap."""
    return logit_scale * x if softcap is None else softcap * torch.tanh(logit_scale * x / softcap)


def target_distribution(
    target: Tensor, probs: Tensor | None, weight: Tensor | None, V: int, label_smoothing: float, dtype: torch.dtype
) -> Tensor:
    """q, shape (..., V): smoothed one-hot or probability targets, times the class weights."""
    hard = torch.nn.functional.one_hot(target, V).to(dtype) if probs is None else probs.to(dtype)
    q = (1.0 - label_smoothing) * hard + label_smoothing / V
    return q if weight is None else q * weight.to(dtype)


def rows(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    probs: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Rows:
    """The row losses of logits (..., V) and targets (...): `sum(q * (lse - x)) + z_loss * lse**2`, 0 where ignored."""
    keep = target != ignore_index
    # `where` takes out ignored rows before and after the formula: their NaN reaches neither value nor gradient.
    x = used_logits(torch.where(keep.unsqueeze(-1), x, 0.0), softcap, logit_scale)
    q = target_distribution(torch.where(keep, target, 0), probs, weight, x.shape[-1], label_smoothing, x.dtype)
    shift = torch.logsumexp(x.detach(), -1, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    shifted = x - shift  # log p, but for the rounding of the shift, which is that of a large logit
    log_s = shifted.exp().sum(-1, keepdim=True).log()
    lse, log_p = (shift + log_s).squeeze(-1), shifted - log_s
    p = log_p.exp()
    nll = torch.where(q == 0, 0.0, q * -log_p).sum(-1)
    return Rows(
        loss=torch.where(keep, nll + z_loss * lse**2, 0.0),
        lse=torch.where(keep, lse, 0.0),
        correct=keep & (x.argmax(-1) == target),
        entropy=torch.where(keep, torch.where(p == 0, 0.0, p * -log_p).sum(-1), 0.0),
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | Collection[int] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """`fused_ignore_ce.fused_cross_entropy` by definition; input (C), (N, C) or (N, C, d1..dK)."""
    x = input.movedim(1, -1) if input.dim() > 1 else input
    probs = None
    if target.is_floating_point():
        probs = target.movedim(1, -1) if target.dim() > 1 else target
        index = probs.argmax(-1)
        keep = torch.ones_like(index, dtype=torch.bool)
    else:
        index = target.long()
        ids = [ignore_index] if isinstance(ignore_index, int) else list(ignore_index)
        keep = torch.stack([index != i for i in ids]).all(0)
    if token_weight is not None:
        keep = keep & (token_weight != 0)
    found = rows(
        x,
        torch.where(keep, index, -1),
        weight,
        probs,
        ignore_index=-1,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    loss, z = found.loss, z_loss * found.lse**2
    share = keep.to(loss.dtype)
    if token_weight is not None:
        share = torch.where(keep, token_weight.to(loss.dtype), 0.0)
        loss, z = loss * share, z * share
    if reduction == "none":
        return loss + z
    if reduction == "sum":
        return loss.sum() + z.sum()
    if normalizer is not None:
        return (loss.sum() + z.sum()) / normalizer
    z_share = share
    if weight is not None and probs is None:
        share = share * weight.to(loss.dtype)[torch.where(keep, index, 0)]
    return loss.sum() / share.sum() + z.sum() / z_share.sum()  # class weights do not scale the z-loss


def divergence(log_p: Tensor, log_q: Tensor, name: str, beta: float = 0.5) -> Tensor:
    """How far the distribution q is from p, with classes last: "forward_kl", "reverse_kl" or "jsd"."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return torch.where(a == 0, 0.0, a * (log_a - log_b)).sum(-1)

    if name == "forward_kl":
        return kl(p, log_p, log_q)
    if name == "reverse_kl":
        return kl(q, log_q, log_p)
    log_m = (beta * p + (1.0 - beta) * q).log()
    return beta * kl(p, log_p, log_m) + (1.0 - beta) * kl(q, log_q, log_m)


def distillation_rows(
    x: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    ids: Tensor | None = None,
    tail: str = "",
    divergence_name: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    scale_by_temperature: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
) -> Tensor:
    """The row losses of `fused_distillation_loss`, 0 where ignored; with `ids`, those of the top-k loss.

    `teacher` are logits, or log-probabilities of the classes `ids`.
    """
    keep = target != ignore_index
    x = used_logits(torch.where(keep.unsqueeze(-1), x, 0.0), softcap, logit_scale)
    log_q = (x / temperature).log_softmax(-1)
    if ids is None:
        log_p = (used_logits(teacher, teacher_softcap, teacher_logit_scale) / temperature).log_softmax(-1)
    elif tail == "renormalise":
        log_p, log_q = teacher.log_softmax(-1), log_q.gather(-1, ids).log_softmax(-1)
    else:
        log_q = log_q.gather(-1, ids)
        log_p, log_q = (
            torch.cat([each, (1.0 - each.exp().sum(-1, keepdim=True)).log()], -1) for each in (teacher, log_q)
        )
    loss = alpha * divergence(log_p, log_q, divergence_name, beta)
    loss = loss * temperature**2 if scale_by_temperature else loss
    index = torch.where(keep, target, 0).unsqueeze(-1)
    nll = -x.log_softmax(-1).gather(-1, index).squeeze(-1)
    return torch.where(keep, loss + (1.0 - alpha) * nll if alpha < 1.0 else loss, 0.0)
