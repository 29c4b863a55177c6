"""The memory-lean PyTorch backend: what CPU tensors get by default. Its functions are those of `protocol.Backend`.

It reads kept rows only, a cache-sized block of rows at a time, into one scratch buffer in the dtype of sums. A row's
sums are relative to its largest used logit c (see `kernels/sums.py` for the formulas); the pair (c, log s) is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.options import LossOptions
from ..core.rows import Block, Logits, Rows, Saved, Upstream, acc_dtype, zero_rows
from .blocks import RowBlock, aligned, kept_blocks, new_scratch, read, scale, write, zero_ignored

__all__ = ["backward", "combine", "forward", "forward_backward", "forward_part", "merge", "new_parts", "scale"]


class _Inputs(NamedTuple):
    """Logits, their targets and the options, as one backend call has them."""

    x: Tensor
    target: Tensor
    weight: Tensor | None
    probs: Tensor | None
    options: LossOptions
    block: Block

    @property
    def uniform(self) -> float:
        """The smoothing's share of one class."""
        return self.options.label_smoothing / self.block.classes


class _Sums(NamedTuple):
    """Per row, sums over classes, relative to the largest logit `m` (or to 0 if that is -inf)."""

    m: Tensor
    s: Tensor
    r: Tensor
    mass: Tensor
    d: Tensor
    argmax: Tensor


def _inputs(
    logits: Logits,
    options: LossOptions,
    block: Block | None = None,
) -> _Inputs:
    return _Inputs(*logits, options, Block(0, logits.x.shape[2]) if block is None else block)


def _finite_or_zero(m: Tensor) -> Tensor:
    """A maximum as a shift: 0 where every logit was -inf, so that -inf - shift stays -inf."""
    return m.masked_fill(m == -torch.inf, 0.0)


def _use(z: Tensor, options: LossOptions) -> Tensor:
    """Turns raw logits into the logits that are used, in place."""
    if options.softcap is not None:
        return z.mul_(options.logit_scale / options.softcap).tanh_().mul_(options.softcap)
    return z.mul_(options.logit_scale) if options.logit_scale != 1.0 else z


def _soft_target(inputs: _Inputs, at: RowBlock, dtype: torch.dtype) -> Tensor | float:
    """The target distribution without index targets: (count, V), (1, V) or, with neither tensor, a number."""
    weight, uniform, smoothing = inputs.weight, inputs.uniform, inputs.options.label_smoothing
    if inputs.probs is None:
        return uniform if weight is None else weight.to(dtype).mul(uniform).unsqueeze(0)
    q = inputs.probs[at.b, at.rows].to(dtype, copy=True)
    if smoothing:
        q.mul_(1.0 - smoothing).add_(uniform)
    return q if weight is None else q.mul_(weight.to(dtype))


def _target_class(inputs: _Inputs, at: RowBlock, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(index, w): the target's place among the classes of x, and its weight, which is 0 if it is not among them."""
    local = inputs.target[at.out] - inputs.block.first_class
    here = (local >= 0) & (local < inputs.x.shape[2])
    index = torch.where(here, local, 0)
    w = torch.where(here, 1.0 - inputs.options.label_smoothing, zero)
    return index, w if inputs.weight is None else w * inputs.weight[index]


def _sums(inputs: _Inputs, at: RowBlock, z: Tensor, with_stats: bool) -> _Sums:
    """The sums of used logits z (count, V), which are overwritten."""
    count, V = z.shape
    m = z.amax(1)
    zero = z.new_zeros(count)
    argmax = z.argmax(1) if with_stats else m
    shift = _finite_or_zero(m)
    if inputs.probs is None:
        index, w = _target_class(inputs, at, zero)
        # A quarter of the difference, as in `_careful_sum`.
        quarter = 0.25 * z.gather(1, index.unsqueeze(1)).squeeze(1) - 0.25 * shift
    z.sub_(shift.unsqueeze(1))
    r, mass, d = zero, zero, zero
    if inputs.probs is not None or inputs.options.label_smoothing:
        q = _soft_target(inputs, at, z.dtype)
        if isinstance(q, Tensor):
            r, mass = (q * z).masked_fill_(q == 0, 0.0).sum(1), q.sum(1).expand(count)  # 0 * inf = 0
        else:
            r, mass = z.sum(1).mul_(q), zero + q * V
        overflown = ~r.isfinite()
        if overflown.any():
            r[overflown] = _careful_sum(inputs, at, q, shift, overflown)
    if inputs.probs is None:
        r = r + torch.where(w == 0, 0.0, 4.0 * (w * quarter))
        mass = mass + w
    if with_stats:
        e = z.exp()
        d = z.mul_(e).masked_fill_(e == 0, 0.0).sum(1)
        s = e.sum(1)
    else:
        s = z.exp_().sum(1)
    return _Sums(m, s, r, mass, d, argmax)


def _careful_sum(inputs: _Inputs, at: RowBlock, q: Tensor | float, shift: Tensor, which: Tensor) -> Tensor:
    """The sums r of the rows `which` of a block: a quarter of a difference of logits does not overflow."""
    u = _use(inputs.x[at.b][at.rows][which].to(shift.dtype, copy=True), inputs.options)
    q = q[which] if isinstance(q, Tensor) and len(q) > 1 else torch.as_tensor(q, dtype=u.dtype, device=u.device)
    quarters = u.mul_(0.25).sub_(0.25 * shift[which].unsqueeze(1)).mul_(q).masked_fill_(q == 0, 0.0)
    return 4.0 * quarters.sum(1)


def _row_sums(inputs: _Inputs, with_stats: bool) -> Iterator[tuple[slice | Tensor, _Sums]]:
    """Yields for every block its rows, as places among all rows, and their sums."""
    x, (probs,) = aligned(inputs.x, inputs.probs)
    inputs = inputs._replace(x=x, probs=probs)
    scratch = new_scratch(x, acc_dtype(x.dtype))
    for at in kept_blocks(x, inputs.target, inputs.options.ignore_index):
        z = _use(read(x, at, scratch), inputs.options)
        yield at.out, _sums(inputs, at, z, with_stats)


def _finish(sums: _Sums, with_stats: bool) -> tuple[Tensor, ...]:
    """The fields of `Rows`; without statistics, the first three."""
    c, log_s = _finite_or_zero(sums.m), sums.s.log()
    found = (sums.mass * log_s - sums.r, c + log_s, torch.stack((c, log_s, sums.mass)))
    return (*found, sums.argmax.long(), log_s - sums.d / sums.s) if with_stats else found


def forward(
    logits: Logits,
    options: LossOptions,
    *,
    with_stats: bool,
) -> Rows:
    found = zero_rows(logits.x, len(logits.target), with_stats)
    if logits.x.shape[2]:
        for at, sums in _row_sums(_inputs(logits, options), with_stats):
            for field, values in zip(found, _finish(sums, with_stats), strict=False):
                field[..., at] = values
    return found


def new_parts(x: Tensor, parts: int, with_stats: bool) -> tuple[Tensor, Tensor]:
    N = x.shape[0] * x.shape[1]
    argmax = x.new_zeros((parts, N if with_stats else 0), dtype=torch.int64)
    return x.new_zeros((5, parts, N), dtype=acc_dtype(x.dtype)), argmax


def forward_part(
    logits: Logits,
    options: LossOptions,
    *,
    parts: tuple[Tensor, Tensor],
    part: int,
    block: Block,
    with_stats: bool,
) -> None:
    partial, argmax = parts
    if logits.x.shape[2] == 0:
        partial[0, part] = -torch.inf
        return
    for at, sums in _row_sums(_inputs(logits, options, block), with_stats):
        partial[:, part, at] = torch.stack(sums[:5])
        if with_stats:
            argmax[part, at] = sums.argmax + block.first_class


def combine(parts: tuple[Tensor, Tensor], options: LossOptions) -> tuple[Tensor, Tensor]:
    (m, s, r, mass, d), argmax = parts
    if len(m) == 1:
        return parts
    largest, at = m.max(0, keepdim=True)
    shift = _finite_or_zero(m) - _finite_or_zero(largest)
    beta = shift.exp().masked_fill_(m == -torch.inf, 0.0)
    quarter = 0.25 * _finite_or_zero(m) - 0.25 * _finite_or_zero(largest)  # it does not overflow
    sums = (s * beta, r + 4.0 * (mass * quarter), mass, (beta * (d + s * shift)).masked_fill_(beta == 0, 0.0))
    partial = torch.stack([largest, *(each.sum(0, keepdim=True) for each in sums)])
    return partial, argmax.gather(0, at) if argmax.shape[1] else argmax[:1]


def merge(target: Tensor, parts: tuple[Tensor, Tensor], options: LossOptions, *, with_stats: bool) -> Rows:
    partial, argmax = combine(parts, options)
    m, s, r, mass, d = partial[:, 0]
    found = zero_rows(partial, len(target), with_stats)
    kept = target != options.ignore_index
    merged = _finish(_Sums(m, s, r, mass, d, argmax[0]), with_stats)
    for field, values in zip(found, merged, strict=False):
        field.copy_(torch.where(kept, values, 0))
    return found


def backward(
    upstream: Upstream,
    logits: Logits,
    saved: Saved,
    options: LossOptions,
    *,
    dx: Tensor | None,
    dprobs: Tensor | None,
    block: Block | None = None,
) -> None:
    x, target, weight, probs = logits
    if x.numel() == 0:
        return
    x, (probs, dx, dprobs) = aligned(x, probs, dx, dprobs)
    inputs = _inputs(Logits(x, target, weight, probs), options, block)
    mass = saved.norm[2]
    scratch = new_scratch(x, mass.dtype)
    g_rows = _upstream_of_rows(upstream, mass)
    for at in kept_blocks(x, target, options.ignore_index):
        g = g_rows[at.out].unsqueeze(1)
        c, log_s = saved.norm[:2, at.out].unsqueeze(2)
        z = read(x, at, scratch)
        slope = None
        if options.softcap is not None and dx is not None:
            slope = torch.mul(z, options.logit_scale / options.softcap).tanh_().square_().neg_().add_(1.0)
        z = _use(z, options)
        if dprobs is not None:
            dq = (z - c).neg_().add_(log_s).mul_(g * (1.0 - options.label_smoothing))
            dprobs[at.b, at.rows] = (dq if weight is None else dq.mul_(weight.to(dq.dtype))).to(dprobs.dtype)
        if dx is not None:
            write(dx, at, _gradient(inputs, at, z, g, upstream, saved, slope))
    for gradient in (dx, dprobs):
        if gradient is not None:
            zero_ignored(gradient, target, options.ignore_index)


def forward_backward(
    upstream: Upstream,
    logits: Logits,
    options: LossOptions,
    *,
    dx: Tensor,
    dz: Tensor | None,
    with_stats: bool,
) -> Rows:
    rows = forward(logits, options, with_stats=with_stats)
    if dz is not None:
        upstream = upstream._replace(dlse=2.0 * options.z_loss * rows.lse * dz)
    backward(upstream, logits, rows.saved, options, dx=dx, dprobs=None)
    return rows


def _upstream_of_rows(upstream: Upstream, mass: Tensor) -> Tensor:
    """The upstream gradient of every row's loss (N,)."""
    g = torch.zeros_like(mass) if upstream.dloss is None else upstream.dloss.to(mass.dtype)
    if upstream.factor is not None:
        g = g * upstream.factor
    if upstream.token_weight is not None:
        g = g * upstream.token_weight
    return g.expand(mass.shape)


def _gradient(
    inputs: _Inputs,
    at: RowBlock,
    z: Tensor,
    g: Tensor,
    upstream: Upstream,
    saved: Saved,
    slope: Tensor | None,
) -> Tensor:
    """Overwrites the used logits z (count, V) with their gradient; g (count, 1) is that of the row losses."""
    options, soft = inputs.options, inputs.probs is not None or inputs.options.label_smoothing != 0.0
    log_s = saved.norm[1, at.out].unsqueeze(1)
    masked = z == -torch.inf if soft or upstream.dlse is not None or upstream.dentropy is not None else None
    if inputs.probs is None:
        index, w = _target_class(inputs, at, g.new_zeros(at.size))
        index = index.unsqueeze(1)
        w = torch.where(z.gather(1, index) != -torch.inf, g * w.unsqueeze(1), 0.0)
    z.sub_(saved.norm[0, at.out].unsqueeze(1))  # may overflow to -inf, which does not count as masked
    # The factor of p in addition to mass * g. Its product is added last: where p is near 1, p * mass - q is exact, and
    # must not be rounded at the size of p.
    factor_p = None if upstream.dlse is None else upstream.dlse[at.out].unsqueeze(1).to(z.dtype)
    if upstream.dentropy is not None:  # -p (log p + H)
        assert saved.entropy is not None  # it is known where it has a gradient
        log_p_and_entropy = z + (saved.entropy[at.out].unsqueeze(1) - log_s)
        log_p_and_entropy.clamp_(min=-1000.0)  # 0 * -1000, and not 0 * -inf
        of_entropy = log_p_and_entropy.mul_(-upstream.dentropy[at.out].unsqueeze(1).to(z.dtype))
        factor_p = of_entropy if factor_p is None else of_entropy.add_(factor_p)
    # p * mass * g, with the normalisation folded into the row's factor, which saves a pass.
    inverse_s = torch.exp(-log_s).masked_fill_(log_s == -torch.inf, 0.0)
    z.exp_()
    added_last = None if factor_p is None else z * (factor_p * inverse_s)
    z.mul_(saved.norm[2, at.out].unsqueeze(1) * g * inverse_s)
    if soft:
        q = _soft_target(inputs, at, z.dtype)
        z.sub_(q.mul_(g) if isinstance(q, Tensor) and inputs.probs is not None else q * g)
    if inputs.probs is None:
        z.scatter_add_(1, index, -w)
    if added_last is not None:
        z.add_(added_last)
    if slope is not None:
        z.mul_(slope)
    if options.softcap is not None or options.logit_scale != 1.0:
        z.mul_(options.logit_scale)
    if masked is not None:
        z.masked_fill_(masked, 0.0)
    return z
