"""Distillation from a teacher that is known by its likeliest classes, with the kernels for all other classes.

A loss depends on the K logits of those classes, and on the logarithm of the sum over all others. It is computed from
these K + 1 numbers of each row in float64, by PyTorch; kernels compute the sum, and spread its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.distillation import DistillationOptions
from ..core.rows import acc_dtype
from .divergences import DistilledRows, Teacher, entropy_of, of_likeliest, used_


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
    """The results of rows x (N, V); writes the gradient of `sum(loss * scale)` to dx (N, V), which may be x.

    While it runs, the logits of the teacher's classes are not in x.
    """
    found = DistilledRows.zeros(x, len(target), with_stats)
    if not x.numel():
        return found
    from ..kernels import top_k as module

    kernels: Any = module
    ids, own = teacher.ids, options.options
    assert ids is not None
    kept = target != own.ignore_index
    label = torch.where(kept, target, 0).unsqueeze(1)
    given = x.gather(1, torch.cat([ids, label], 1))
    kernels.take_out(x, ids, own)
    # At which temperatures the other classes matter.
    with_others = options.alpha > 0.0 and options.tail == "bucket" and ids.shape[1] < x.shape[1]
    at = [options.temperature] * with_others + [1.0] * (options.alpha < 1.0 or with_stats)
    temperatures = tuple(dict.fromkeys(at))
    # Used logits are float64, and relative to the largest of a row; `top` is the largest of the other classes.
    exact = torch.float64 if own.softcap is not None else acc_dtype(x.dtype)  # as the kernel has them
    z = used_(given.to(exact, copy=True), own.softcap, own.logit_scale).to(torch.float64)
    slope = own.logit_scale if own.softcap is None else own.logit_scale * (1.0 - (z / own.softcap) ** 2)
    top, log_sums = z.new_full((len(z), 1), -torch.inf), z.new_zeros(2, len(z), 1)
    if temperatures:
        others = kernels.forward(x, target, own, temperatures, with_stats=with_stats)
        top = others.saved[0].to(torch.float64).unsqueeze(1) * (own.softcap or 1.0)
        log_sums = torch.stack([others.saved[1], others.saved[-1]]).to(torch.float64).log().unsqueeze(2)
    largest = torch.maximum(z[:, :-1].amax(1, keepdim=True), top)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    z, top = z - largest, top - largest
    lse = torch.stack([top / options.temperature, top]) + log_sums

    loss, gradient, factors = _losses(z, label, ids, teacher.values, lse, with_others, options)
    found.loss.copy_(torch.where(kept, loss, 0.0))
    if with_stats:
        predicted = torch.where(kept, others.predicted, 0).unsqueeze(1)
        best = top.masked_fill(lse[1] == -torch.inf, -torch.inf)
        classes, used = torch.cat([ids, predicted], 1), torch.cat([z[:, :-1], best], 1)
        first = classes.masked_fill_(used != used.amax(1, keepdim=True), x.shape[1]).amin(1)
        logits = torch.cat([z[:, :-1], lse[1]], 1)
        log_q = logits.log_softmax(1)
        entropy = entropy_of(log_q) + log_q[:, -1].exp() * others.entropy
        stats = logits.logsumexp(1) + largest.squeeze(1), first, entropy
        for values, of_kept in zip(found[1:], stats, strict=True):
            values.copy_(torch.where(kept, of_kept, 0))
    if dx is not None:
        assert scale is not None
        upstream = torch.where(kept, scale.to(torch.float64), 0.0)
        if temperatures:
            factors = factors if len(temperatures) > 1 else factors.sum(0, keepdim=True)
            kernels.backward(factors * upstream, x, target, others.saved, own, temperatures, dx=dx)
        else:
            dx.zero_()
        gradient = torch.where(kept.unsqueeze(1), gradient * slope * upstream.unsqueeze(1), 0.0).to(dx.dtype)
        if options.alpha < 1.0:
            dx.scatter_(1, label, gradient[:, -1:])
        dx.scatter_(1, ids, gradient[:, :-1])  # the label may be one of them
    if dx is not x:
        x.scatter_(1, ids, given[:, :-1])
    return found


def _losses(
    z: Tensor, label: Tensor, ids: Tensor, values: Tensor, lse: Tensor, with_others: bool, options: DistillationOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (N,), and their gradients with respect to z and lse.

    `z` (N, K + 1) are the used logits of `ids` and of the label. `lse` (2, N, 1) are the logarithms of the sums over
    all other classes, at the temperature and at 1; their gradient is (2, N).
    """
    T, z_label, z = options.temperature, z[:, -1:], z[:, :-1]
    loss, gradient, factors = z.new_zeros(len(z)), torch.zeros_like(z), z.new_zeros(2, len(z))
    of_label = torch.zeros_like(z_label)
    if options.alpha:
        log_q = torch.cat([z / T, lse[0]], 1) if with_others else z / T
        loss, g = of_likeliest(log_q.log_softmax(1), values.to(z.dtype), options)
        loss, g = loss * options.share, g * options.share
        gradient = g[:, : z.shape[1]] / T
        if with_others:
            factors[0] = g[:, -1]
            of_label += g[:, -1:] * (z_label / T - lse[0]).exp() / T
    if options.alpha < 1.0:
        hard, logits = 1.0 - options.alpha, torch.cat([z, lse[1]], 1)
        loss = loss + hard * (logits.logsumexp(1) - z_label.squeeze(1))
        q = logits.softmax(1) * hard
        gradient = gradient + q[:, :-1] - hard * (ids == label).to(z.dtype)
        factors[1] = q[:, -1]
        of_label += q[:, -1:] * (z_label - lse[1]).exp() - hard
    return loss, torch.cat([gradient, of_label.masked_fill_(z_label == -torch.inf, 0.0)], 1), factors
