"""The memory-lean PyTorch backend: what CPU tensors get by default.

Kept rows only, a cache-sized block at a time, in one float32 scratch buffer that every block reuses. The
mathematics and the saved tensors are those of the Triton kernels (see `kernels/forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements of a block of rows: 8 MiB of float32, which stay in the last-level cache between the passes over a block.
#: On a 2-core EPYC (32 MiB of cache; N=2048, V=32768, bf16), 2^20 to 2^22 took the same time and 2^23 a third more;
#: with fewer, larger blocks, threads wait for each other less where cores are shared.
BLOCK_ELEMENTS = 1 << 21


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
    probs: Tensor | None, weight: Tensor | None, rows: slice | Tensor, b: int, V: int, smoothing: float, dtype
) -> Tensor:
    """The part of the target distribution that is no index: (count, V) or, without probabilities, (1, V)."""
    if probs is not None:
        q = probs[b, rows].to(dtype)
        if smoothing:
            q = q * (1.0 - smoothing) + smoothing / V
    else:
        device = weight.device if weight is not None else None
        q = torch.full((1, V), smoothing / V, dtype=dtype, device=device)
    return q if weight is None else q * weight.to(dtype)


def forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses and what backward needs: (loss, lse, mass, correct, entropy)."""
    B, T, V = x.shape
    N = B * T
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss, mass = x.new_zeros(N, dtype=dtype), x.new_zeros(N, dtype=dtype)
    lse = x.new_zeros((2, N), dtype=dtype)
    correct = x.new_zeros(N if with_stats else 0, dtype=torch.bool)
    entropy = x.new_zeros(N if with_stats else 0, dtype=dtype)
    if V == 0:
        return loss, lse, mass, correct, entropy

    x, (probs,) = _aligned(x, probs)
    B, T, V = x.shape
    scratch = x.new_empty((min(max(1, BLOCK_ELEMENTS // V), T), V), dtype=dtype)
    for b, rows, count in _kept_blocks(x, target, ignore_index):
        out = slice(rows.start + b * T, rows.stop + b * T) if isinstance(rows, slice) else rows + b * T
        z = _use(_read(x[b], rows, scratch[:count]), softcap, logit_scale)
        c = z.amax(1, keepdim=True)
        c.masked_fill_(c == -torch.inf, 0.0)
        if with_stats:
            correct[out] = z.argmax(1) == target[out]
        z.sub_(c)
        if probs is not None or label_smoothing:
            q = _soft_target(probs, weight, rows, b, V, label_smoothing, dtype)
            r = (q * z).masked_fill_(q == 0, 0.0).sum(1)
            row_mass = q.sum(1).expand(count)
        else:
            r = row_mass = z.new_zeros(count)
        if probs is None:
            index = target[out]
            w = z.new_full((count,), 1.0 - label_smoothing)
            if weight is not None:
                w *= weight[index]
            z_target = z.gather(1, index.unsqueeze(1)).squeeze(1)
            r = r + torch.where(w == 0, 0.0, w * z_target)
            row_mass = row_mass + w
        if with_stats:
            e = z.exp()
            s = e.sum(1)
            entropy[out] = s.log() - z.mul_(e).masked_fill_(e == 0, 0.0).sum(1) / s
        else:
            s = z.exp_().sum(1)
        log_s = s.log()
        c = c.squeeze(1)
        loss[out] = row_mass * log_s - r + z_loss * (c + log_s) ** 2
        lse[0, out] = c
        lse[1, out] = log_s
        mass[out] = row_mass
    return loss, lse, mass, correct, entropy


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
) -> None:
    """Writes the gradients of kept rows into `dx` (which may be `x`) and `dprobs`, zeros elsewhere."""
    if x.numel() == 0:
        return
    x, (probs, dx, dprobs) = _aligned(x, probs, dx, dprobs)
    T, V = x.shape[1:]
    dtype = lse.dtype
    scratch = x.new_empty((min(max(1, BLOCK_ELEMENTS // V), T), V), dtype=dtype)
    for b, rows, count in _kept_blocks(x, target, ignore_index):
        out = slice(rows.start + b * T, rows.stop + b * T) if isinstance(rows, slice) else rows + b * T
        g = dloss[out].to(dtype).unsqueeze(1)
        c, log_s = lse[:, out].unsqueeze(2)
        z = _read(x[b], rows, scratch[:count])
        slope = None
        if softcap is not None and dx is not None:
            slope = 1.0 - torch.tanh(z * (logit_scale / softcap)).square_()
        z = _use(z, softcap, logit_scale).sub_(c)
        if dprobs is not None:
            dq = (log_s - z).mul_(g * (1.0 - label_smoothing))
            dprobs[b, rows] = (dq if weight is None else dq.mul_(weight.to(dtype))).to(dprobs.dtype)
        if dx is None:
            continue
        subtrahend = masked = None
        if probs is not None or label_smoothing:
            subtrahend = _soft_target(probs, weight, rows, b, V, label_smoothing, dtype) * g
            masked = z == -torch.inf
        if probs is None:
            index = target[out].unsqueeze(1)
            w = g * (1.0 - label_smoothing)
            if weight is not None:
                w = w * weight[index]
            w = torch.where(z.gather(1, index) == -torch.inf, 0.0, w)
        # p * mass * g with the normalisation folded into the row's factor: one pass less.
        inverse_s = torch.exp(-log_s).masked_fill_(log_s == -torch.inf, 0.0)
        z.exp_()
        z_term = z * (2.0 * z_loss * g * (c + log_s) * inverse_s) if z_loss else None
        z.mul_(mass[out].unsqueeze(1) * g * inverse_s)
        if subtrahend is not None:
            z.sub_(subtrahend)
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
