"""The memory-lean PyTorch backend: what CPU tensors get by default.

Kept rows only, a cache-sized block at a time, in one float32 scratch buffer that every block reuses. The
mathematics and the saved tensors are those of the Triton kernels (see `kernels/forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Elements of a block of rows: 8 MiB of float32, which stay in the last-level cache between the passes over a block.
#: On a 2-core EPYC (32 MiB of cache; N=2048, V=32768, bf16), 2^20 to 2^22 took the same time and 2^23 a third more;
#: with fewer, larger blocks, threads wait for each other less where cores are shared.
BLOCK_ELEMENTS = 1 << 21

#: Tensors of a block's size, in float32, that are alive at a time: at most this many, and two more with probabilities.
BLOCK_TEMPORARIES = 4


def _flat_if_view(x: Tensor) -> Tensor:
    """(B, T, V) as (1, B * T, V) where strides allow it, so that blocks can span the first dimension."""
    B, T, V = x.shape
    if B == 1 or T == 0 or x.stride(0) == T * x.stride(1):
        return x.as_strided((1, B * T, V), (0, x.stride(1), x.stride(2)), x.storage_offset())
    return x


def _kept_blocks(x: Tensor, target: Tensor, ignore_index: int) -> Iterator[tuple[int, slice | Tensor, int]]:
    """(b, rows, count): the kept rows of `x[b]`, a block at a time; a slice (no copy) where no row is ignored."""
    B, T, V = x.shape
    block = max(1, BLOCK_ELEMENTS // max(V, 1))
    for b, target_b in enumerate(target.view(B, T)):
        kept = (target_b != ignore_index).nonzero().squeeze(1)
        for start in range(0, len(kept), block):
            rows = kept[start : start + block]
            whole = len(kept) == T
            yield b, slice(start, start + len(rows)) if whole else rows, len(rows)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    if target.device.type != "cpu":
        return  # gather asserts on the device; looking here would wait for it
    wrong = (target != ignore_index) & ((target < 0) | (target >= V))
    if wrong.any():
        raise IndexError(
            f"target {target[wrong][0].item()} is out of bounds: expected a class in [0, {V}) or "
            f"ignore_index={ignore_index}"
        )


def _read(x: Tensor, rows: slice | Tensor, scratch: Tensor) -> Tensor:
    """The rows of x (T, V), in the scratch buffer and its dtype."""
    if isinstance(rows, Tensor) and x.dtype == scratch.dtype:
        return torch.index_select(x, 0, rows, out=scratch)
    return scratch.copy_(x[rows])


def _use(z: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Turns raw logits into the logits that are used, in place."""
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    return z.mul_(logit_scale) if logit_scale != 1.0 else z


def _soft_target(
    probs: Tensor | None, weight: Tensor | None, rows: slice | Tensor, b: int, uniform: float, smoothing: float, dtype
) -> Tensor | float:
    """The part of the target distribution that is no index: (count, V), (1, V) or, without either tensor, a number.

    `uniform` is the smoothing's share of one class.
    """
    if probs is None:
        return uniform if weight is None else weight.to(dtype).mul(uniform).unsqueeze(0)
    q = probs[b, rows].to(dtype, copy=True)
    if smoothing:
        q.mul_(1.0 - smoothing).add_(uniform)
    return q if weight is None else q.mul_(weight.to(dtype))


def _expectation(q: Tensor, z: Tensor) -> Tensor:
    """`sum(q * z)` of every row with 0 * inf = 0."""
    return (q * z).masked_fill_(q == 0, 0.0).sum(1)


class _Sums(NamedTuple):
    """Per row, sums over classes, relative to the largest logit `m` (or to 0 if that is -inf)."""

    m: Tensor
    s: Tensor
    r: Tensor
    mass: Tensor
    d: Tensor
    argmax: Tensor


def _sums(
    z: Tensor,
    local: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    rows: slice | Tensor,
    b: int,
    uniform: float,
    smoothing: float,
    with_stats: bool,
) -> _Sums:
    """Of used logits z (count, V), which are overwritten; `local` is the target's place among them, if it is there."""
    count, V = z.shape
    m = z.amax(1)
    zero = z.new_zeros(count)
    argmax = z.argmax(1) if with_stats else local
    z.sub_(m.masked_fill(m == -torch.inf, 0.0).unsqueeze(1))
    r, mass, d = zero, zero, zero
    if probs is not None or smoothing:
        q = _soft_target(probs, weight, rows, b, uniform, smoothing, z.dtype)
        if isinstance(q, Tensor):
            r, mass = _expectation(q, z), q.sum(1).expand(count)
        else:
            r, mass = z.sum(1).mul_(q), zero + q * V
    if probs is None:
        here = (local >= 0) & (local < V)
        index = torch.where(here, local, 0)
        w = torch.where(here, 1.0 - smoothing, zero)
        if weight is not None:
            w = w * weight[index]
        z_target = z.gather(1, index.unsqueeze(1)).squeeze(1)
        r = r + torch.where(w == 0, 0.0, w * z_target)
        mass = mass + w
    if with_stats:
        e = z.exp()
        d = z.mul_(e).masked_fill_(e == 0, 0.0).sum(1)
        s = e.sum(1)
    else:
        s = z.exp_().sum(1)
    return _Sums(m, s, r, mass, d, argmax)


def _finish(sums: _Sums, target: Tensor, z_loss: float, with_stats: bool) -> tuple[Tensor, ...]:
    """The rows' (loss, lse, mass) and, with statistics, (correct, entropy)."""
    m, s, r, mass, d, argmax = sums
    c = m.masked_fill(m == -torch.inf, 0.0)
    log_s = s.log()
    loss = mass * log_s - r + z_loss * (c + log_s) ** 2
    found = (loss, torch.stack((c, log_s)), mass)
    return (*found, argmax == target, log_s - d / s) if with_stats else found


def _outputs(x: Tensor, N: int, dtype: torch.dtype, with_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, mass, correct, entropy), zeros."""
    stats = N if with_stats else 0
    return (
        x.new_zeros(N, dtype=dtype),
        x.new_zeros((2, N), dtype=dtype),
        x.new_zeros(N, dtype=dtype),
        x.new_zeros(stats, dtype=torch.bool),
        x.new_zeros(stats, dtype=dtype),
    )


def _row_sums(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    with_stats: bool,
    first_class: int,
    classes: int,
) -> Iterator[tuple[slice | Tensor, _Sums]]:
    """A block of kept rows at a time: which, and their sums."""
    x, (probs,) = _aligned(x, probs)
    _, T, V = x.shape
    dtype = _acc(x)
    scratch = x.new_empty((min(max(1, BLOCK_ELEMENTS // V), T), V), dtype=dtype)
    for b, rows, count in _kept_blocks(x, target, ignore_index):
        out = slice(rows.start + b * T, rows.stop + b * T) if isinstance(rows, slice) else rows + b * T
        z = _use(_read(x[b], rows, scratch[:count]), softcap, logit_scale)
        local = target[out] - first_class
        yield out, _sums(z, local, weight, probs, rows, b, label_smoothing / classes, label_smoothing, with_stats)


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, probs: Tensor | None, *, with_stats: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses and what backward needs: (loss, lse, mass, correct, entropy)."""
    V = x.shape[2]
    outputs = _outputs(x, x.shape[0] * x.shape[1], _acc(x), with_stats)
    if V == 0:
        return outputs
    z_loss = options.pop("z_loss")
    blocks = _row_sums(x, target, weight, probs, with_stats=with_stats, first_class=0, classes=V, **options)
    for rows, sums in blocks:
        for output, found in zip(outputs, _finish(sums, target[rows], z_loss, with_stats), strict=False):
            output[..., rows] = found
    return outputs


def new_parts(x: Tensor, parts: int, with_stats: bool) -> tuple[Tensor, Tensor]:
    """Room for what `forward_part` leaves of `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    N = x.shape[0] * x.shape[1]
    argmax = x.new_zeros((parts, N if with_stats else 0), dtype=torch.int32)
    return x.new_zeros((5, parts, N), dtype=_acc(x)), argmax


def forward_part(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    *,
    parts: tuple[Tensor, Tensor],
    part: int,
    first_class: int,
    classes: int,
    with_stats: bool,
    **options: Any,
) -> None:
    """The sums over one block of the vocabulary, into number `part` of `parts`.

    `x`, `weight` and `probs` are the block's, from `first_class` on; `classes` is the size of the whole vocabulary.
    """
    del options["z_loss"]
    partial, argmax = parts
    if x.shape[2] == 0:
        partial[0, part] = -torch.inf
        return
    blocks = _row_sums(
        x, target, weight, probs, with_stats=with_stats, first_class=first_class, classes=classes, **options
    )
    for rows, sums in blocks:
        partial[:, part, rows] = torch.stack(sums[:5])
        if with_stats:
            argmax[part, rows] = (sums.argmax + first_class).int()


def combine(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sums over all parts, as one part: ((5, 1, N), (1, N))."""
    (m, s, r, mass, d), argmax = parts
    if len(m) == 1:
        return parts
    largest, at = m.max(0, keepdim=True)
    shift = m.masked_fill(m == -torch.inf, 0.0) - largest.masked_fill(largest == -torch.inf, 0.0)
    beta = shift.exp().masked_fill_(m == -torch.inf, 0.0)
    sums = (s * beta, r + mass * shift, mass, beta * (d + s * shift))
    partial = torch.stack([largest, *(each.sum(0, keepdim=True) for each in sums)])
    return partial, argmax.gather(0, at) if argmax.shape[1] else argmax[:1]


def merge(
    target: Tensor, parts: tuple[Tensor, Tensor], *, ignore_index: int, z_loss: float, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, from all parts."""
    partial, argmax = combine(parts)
    outputs = _outputs(partial, len(target), partial.dtype, with_stats)
    m, s, r, mass, d = partial[:, 0]
    sums = _Sums(m, s, r, mass, d, argmax[0] if with_stats else target)
    kept = target != ignore_index
    for output, found in zip(outputs, _finish(sums, target, z_loss, with_stats), strict=False):
        output.copy_(torch.where(kept, found, 0))
    return outputs


def backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    dx: Tensor | None,
    dprobs: Tensor | None,
    first_class: int = 0,
    classes: int | None = None,
) -> None:
    """Writes the gradients of kept rows into `dx` (which may be `x`) and `dprobs`, zeros elsewhere.

    `first_class` and `classes` are those of `forward_part`; without them, `x` has the whole vocabulary.
    """
    if x.numel() == 0:
        return
    x, (probs, dx, dprobs) = _aligned(x, probs, dx, dprobs)
    T, V = x.shape[1:]
    uniform = label_smoothing / (V if classes is None else classes)
    dtype = lse.dtype
    scratch = x.new_empty((min(max(1, BLOCK_ELEMENTS // V), T), V), dtype=dtype)
    for b, rows, count in _kept_blocks(x, target, ignore_index):
        out = slice(rows.start + b * T, rows.stop + b * T) if isinstance(rows, slice) else rows + b * T
        g = dloss[out].to(dtype).unsqueeze(1)
        c, log_s = lse[:, out].unsqueeze(2)
        z = _read(x[b], rows, scratch[:count])
        slope = None
        if softcap is not None and dx is not None:
            slope = torch.mul(z, logit_scale / softcap).tanh_().square_().neg_().add_(1.0)
        z = _use(z, softcap, logit_scale).sub_(c)
        if dprobs is not None:
            dq = (log_s - z).mul_(g * (1.0 - label_smoothing))
            dprobs[b, rows] = (dq if weight is None else dq.mul_(weight.to(dtype))).to(dprobs.dtype)
        if dx is None:
            continue
        masked = None
        if probs is not None or label_smoothing:
            masked = z == -torch.inf
        if probs is None:
            local = (target[out] - first_class).unsqueeze(1)
            here = (local >= 0) & (local < V)
            index = torch.where(here, local, 0)
            w = g * (1.0 - label_smoothing)
            if weight is not None:
                w = w * weight[index]
            w = torch.where(here & (z.gather(1, index) != -torch.inf), w, 0.0)
        # p * mass * g with the normalisation folded into the row's factor: one pass less.
        inverse_s = torch.exp(-log_s).masked_fill_(log_s == -torch.inf, 0.0)
        z.exp_()
        z_term = z * (2.0 * z_loss * g * (c + log_s) * inverse_s) if z_loss else None
        z.mul_(mass[out].unsqueeze(1) * g * inverse_s)
        if masked is not None:
            q = _soft_target(probs, weight, rows, b, uniform, label_smoothing, dtype)
            z.sub_(q.mul_(g) if isinstance(q, Tensor) and probs is not None else q * g)
        if probs is None:
            z.scatter_add_(1, index, -w)
        if z_term is not None:
            z.add_(z_term)
        if slope is not None:
            z.mul_(slope)
        if softcap is not None or logit_scale != 1.0:
            z.mul_(logit_scale)
        if masked is not None:
            z.masked_fill_(masked, 0.0)
        if isinstance(rows, slice):
            dx[b, rows].copy_(z)
        else:
            dx[b].index_copy_(0, rows, z.to(dx.dtype))
    for gradient in (dx, dprobs):
        if gradient is not None:
            _zero_ignored(gradient, target, ignore_index)


def _zero_ignored(gradient: Tensor, target: Tensor, ignore_index: int) -> None:
    B, T, _ = gradient.shape
    for gradient_b, target_b in zip(gradient, target.view(B, T), strict=True):
        ignored = (target_b == ignore_index).nonzero().squeeze(1)
        if len(ignored):
            gradient_b.index_fill_(0, ignored, 0.0)


def _aligned(x: Tensor, *others: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """All of them with the first dimension merged into the second, if all of them can be viewed so."""
    flat = tuple(None if t is None else _flat_if_view(t) for t in others)
    if all(t is None or t.shape[0] == 1 for t in (_flat_if_view(x), *flat)):
        return _flat_if_view(x), flat
    return x, others
