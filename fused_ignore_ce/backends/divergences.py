"""Divergences of two distributions and their gradients, in PyTorch, a cache-sized block of rows at a time.

For a row with the teacher's distribution p and the student's q, where 0 * log(0) = 0:

- forward_kl: sum(p * (log p - log q))
- reverse_kl: sum(q * (log q - log p))
- jsd: beta * KL(p | m) + (1 - beta) * KL(q | m), with m = beta * p + (1 - beta) * q (Agarwal et al., "On-policy
  distillation of language models", arXiv:2306.13649)

With g, the derivative with respect to log q, the gradient with respect to the student's logits is g - q * sum(g).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.distillation import DistillationOptions
from ..core.rows import acc_dtype
from .blocks import kept_blocks, read, rows_per_block, write, zero_ignored


class DistilledRows(NamedTuple):
    """The results of N rows; all are 0 at ignored rows. The last three are empty without statistics."""

    loss: Tensor  # (N,)
    lse: Tensor  # (N,) log(sum(exp(the student's used logits))) in nats
    predicted: Tensor  # (N,) int64 class of the student's largest used logit
    entropy: Tensor  # (N,) entropy of the student's softmax in nats

    @staticmethod
    def zeros(like: Tensor, N: int, with_stats: bool) -> DistilledRows:
        n, dtype = N if with_stats else 0, acc_dtype(like.dtype)
        loss, *stats = (like.new_zeros(size, dtype=dtype) for size in (N, n, n))
        return DistilledRows(loss, stats[0], like.new_zeros(n, dtype=torch.int64), stats[1])


def divergence(log_p: Tensor, log_q: Tensor, name: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row (N,), and g (N, V). Classes are last; `log_p` and `log_q` are normalised."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        loss = _where(p, p * (log_p - log_q)).sum(-1)
        return loss, p.neg_()
    if name == "reverse_kl":
        ratio = log_q - log_p
        loss = _where(q, q * ratio).sum(-1)
        return loss, _where(q, q * (ratio + 1.0))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_q = _where(q, q * (log_q - log_m)).mul_(1.0 - beta)
    loss = beta * _where(p, p * (log_p - log_m)).sum(-1) + of_q.sum(-1)
    return loss, of_q


def _where(probability: Tensor, value: Tensor) -> Tensor:
    """The value, and 0 where the probability is 0."""
    return value.masked_fill_(probability == 0, 0.0)


class Teacher(NamedTuple):
    """What is known of the teacher for N rows."""

    values: Tensor  # (N, V) logits, or (N, K) log-probabilities of its likeliest classes
    ids: Tensor | None = None  # (N, K) int64, those classes

    def at(self, rows: slice | Tensor) -> Teacher:
        return Teacher(self.values[rows], None if self.ids is None else self.ids[rows])


def saved_like(loss: Tensor, backend: str) -> Tensor:
    """What a backend saves for backward: the kernels seven numbers of every row, PyTorch nothing."""
    return loss.new_empty((7, len(loss)) if backend == "triton" else 0)


class ByRows(NamedTuple):
    """The functions of a backend for distillation, all made of one that computes losses and, if wanted, gradients."""

    rows: Callable[..., DistilledRows]

    def forward(
        self, x: Tensor, teacher: Teacher, target: Tensor, options: DistillationOptions, *, with_stats: bool
    ) -> tuple[DistilledRows, Tensor]:
        found = self.rows(x, teacher, target, options, with_stats=with_stats)
        return found, saved_like(found.loss, "torch")

    def backward(
        self, dloss: Tensor, x: Tensor, teacher: Teacher, target: Tensor, saved: Tensor, options: DistillationOptions,
        *, dx: Tensor,
    ) -> None:  # fmt: skip
        self.rows(x, teacher, target, options, with_stats=False, scale=dloss, dx=dx)

    def forward_backward(
        self, scale: Tensor, x: Tensor, teacher: Teacher, target: Tensor, options: DistillationOptions,
        *, dx: Tensor, with_stats: bool,
    ) -> DistilledRows:  # fmt: skip
        return self.rows(x, teacher, target, options, with_stats=with_stats, scale=scale, dx=dx)


def rows(
    x: Tensor,
    teacher: Teacher,
    target: Tensor,
    options: DistillationOptions,
    *,
    with_stats: bool,
    scale: Tensor | None = None,
    dx: Tensor | None = None,
) -> DistilledRows:
    """The results of rows x (N, V); writes the gradient of `sum(loss * scale)` to dx (N, V), which may be x."""
    found = DistilledRows.zeros(x, len(target), with_stats)
    (N, V), dtype, ignored = x.shape, acc_dtype(x.dtype), options.options.ignore_index
    if V == 0:
        return found
    scratch = x.new_empty((min(rows_per_block(V), max(N, 1)), V), dtype=dtype)

    def compute(values: Tensor, teacher: Teacher, labels: Tensor) -> list[Tensor]:
        z = used_(values, options.options.softcap, options.options.logit_scale)
        return _block(z, teacher, labels, options, with_stats, dx is not None)

    for at in kept_blocks(x.unsqueeze(0), target, ignored):
        theirs, labels = teacher.at(at.rows), target[at.out]
        results = compute(read(x.unsqueeze(0), at, scratch), theirs, labels)
        # Differences of the largest finite logits overflow, and so do large logits at a low temperature.
        overflown = (~results[0].isfinite()).nonzero().squeeze(1)
        for some in overflown.split(max(1, rows_per_block(V) // 4)):  # fewer rows: their elements take twice the memory
            exact = compute(x[at.rows][some].to(torch.float64, copy=True), theirs.at(some), labels[some])
            for values, wide in zip(results, exact, strict=True):
                values[some] = wide.to(values.dtype)
        if dx is not None:
            assert scale is not None
            write(dx.unsqueeze(0), at, results.pop(1).mul_(scale[at.out].to(dtype).unsqueeze(1)))
        for field, values in zip(found, results, strict=False):
            field[at.out] = values
    if dx is not None:
        zero_ignored(dx.unsqueeze(0), target, ignored)
    return found


def _block(
    z: Tensor, teacher: Teacher, target: Tensor, options: DistillationOptions, with_stats: bool, with_gradient: bool
) -> list[Tensor]:
    """Loss, gradient, lse, predicted class and entropy, if wanted, of rows of used logits z, which are overwritten."""
    T, cap, alpha = options.temperature, options.options.softcap, options.alpha
    loss, gradient = z.new_zeros(len(z)), torch.zeros_like(z) if with_gradient and not alpha else None
    if alpha:
        loss, gradient = _divergence(z if T == 1.0 else z / T, teacher, options, with_gradient)
        loss = loss * options.share
        if gradient is not None:
            gradient.mul_(options.share / T)
    log_softmax = z.log_softmax(-1) if alpha < 1.0 or with_stats else z
    if alpha < 1.0:
        index = target.unsqueeze(1)
        loss = loss - (1.0 - alpha) * log_softmax.gather(1, index).squeeze(1)
        if gradient is not None:
            gradient.add_(log_softmax.exp(), alpha=1.0 - alpha)
            gradient.scatter_add_(1, index, gradient.new_full(index.shape, alpha - 1.0))
    results = [loss]
    if with_stats:
        results += z.logsumexp(-1), z.argmax(-1), entropy_of(log_softmax)
    if gradient is not None:
        if cap is not None:  # the derivative of the cap is 1 - tanh**2
            gradient.mul_(z.div_(cap).square_().neg_().add_(1.0))
        if options.options.logit_scale != 1.0:
            gradient.mul_(options.options.logit_scale)
        results.insert(1, gradient)
    return results


def _divergence(
    z: Tensor, teacher: Teacher, options: DistillationOptions, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence for logits z (N, V) that the temperature has divided, and its gradient with respect to them."""
    values, ids = teacher.values.to(z.dtype, copy=True), teacher.ids
    if ids is None:
        used_(values, options.teacher_softcap, options.teacher_logit_scale).div_(options.temperature)
    if ids is None:
        log_q = z.log_softmax(-1)
        loss, g = divergence(values.log_softmax(-1), log_q, options.divergence, options.beta)
        return loss, g.sub_(log_q.exp_().mul_(g.sum(-1, keepdim=True))) if with_gradient else None
    if options.tail == "renormalise" or ids.shape[1] == z.shape[1]:
        loss, g = of_likeliest(z.gather(1, ids).log_softmax(-1), values, options)
        return loss, torch.zeros_like(z).scatter_add_(1, ids, g) if with_gradient else None
    log_q = z.log_softmax(-1)
    rest = log_q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    loss, g = of_likeliest(torch.cat([log_q.gather(1, ids), rest], -1), values, options)
    del log_q
    if not with_gradient:
        return loss, None
    # From logits: far below the largest, log-probabilities of all classes no longer tell the others apart.
    of_rest = z.scatter(1, ids, -torch.inf).softmax(-1).masked_fill_(rest == -torch.inf, 0.0)
    return loss, of_rest.mul_(g[:, -1:]).scatter_add_(1, ids, g[:, :-1])


def of_likeliest(log_q: Tensor, values: Tensor, options: DistillationOptions) -> tuple[Tensor, Tensor]:
    """The divergence (N,) from a teacher's likeliest classes, and its gradient with respect to the student's logits.

    `values` (N, K) are the teacher's log-probabilities, `log_q` the student's, which are normalised. If those have one
    class more, it stands for all others.
    """
    if log_q.shape[1] > values.shape[1]:
        p_rest = (1.0 - values.exp().sum(-1, keepdim=True)).clamp_min_(0.0)
        log_p = torch.cat([values, p_rest.log()], -1)
    else:
        log_p = values if options.tail == "bucket" else values.log_softmax(-1)
    loss, g = divergence(log_p, log_q, options.divergence, options.beta)
    return loss, g.sub_(log_q.exp().mul_(g.sum(-1, keepdim=True)))


def entropy_of(log_q: Tensor) -> Tensor:
    """The entropy (N,) of normalised log-probabilities."""
    q = log_q.exp()
    return _where(q, q * log_q).sum(-1).neg_()


def used_(x: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Turns raw logits into the logits that are used, in place."""
    if softcap is not None:
        return x.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    return x.mul_(logit_scale) if logit_scale != 1.0 else x
