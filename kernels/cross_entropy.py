"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`logits` are (x, target, class weights or None, probabilities or None). `x` and the probabilities are (B, T, V), (N, V)
or (V,) with any strides, and `target` is (N,) int64 and contiguous, for N = B * T. An ignored row has
`target == options.ignore_index`. `options`, a hashable object, has ignore_index, label_smoothing, softcap, logit_scale
and z_loss.
"""

from collections import namedtuple

import torch
import triton

from . import prepare
from .arguments import acc_dtype, form_of, new_rows, row_pointers, row_stride, row_strides
from .device_math import LOG2E, LOWEST
from .forward import forward_kernel
from .launch import MERGE_AND_REDUCE_ROWS, chip_of

#: The results of rows that `backward` needs, and the gradients of results. Callers may pass objects of their own.
Saved = namedtuple("Saved", "norm entropy")
Upstream = namedtuple("Upstream", "dloss dlse dentropy factor token_weight")


def interpreted():
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _forward(rows, logits, options, with_stats, launch):
    """Fills the rows, or returns the parts that have to be merged into them."""
    x, target, weight, probs = logits
    if len(target) == 0:
        return None
    forward_rows = prepare.forward(
        form_of(x), form_of(probs), form_of(weight), options, with_stats, None, launch, chip_of(x.device)
    )
    parts = new_parts(x, forward_rows.splits, with_stats) if forward_rows.splits > 1 else None
    if parts is None:
        forward_rows(x, probs, target, weight, row_pointers(rows, with_stats), None)
    else:
        forward_rows(x, probs, target, weight, None, (*parts, parts[0].stride(0)))
    return parts


def forward(logits, options, *, with_stats=False, launch=None):
    """Row losses and what backward needs: (loss, lse, norm, predicted, entropy)."""
    x, target, *_ = logits
    rows = new_rows(x, len(target), acc_dtype(x.dtype), with_stats)
    parts = _forward(rows, logits, options, with_stats, launch)
    if parts:
        _merge(target, parts, rows, options, with_stats)
    return rows


def forward_reduce(
    logits, token_weight, normalizer, options, *, mean, out_dtype=None, with_stats=False, launch=None
):  # fmt: skip
    """(what `forward` returns, what `reduce` returns), in two launches unless rows are very many (see `reduce.py`).

    Without statistics, the rows have only losses and norm. As in PyTorch, class weights enter the divisor of "mean"
    for index targets only.
    """
    x, target, weight, probs = logits
    N, acc = len(target), acc_dtype(x.dtype)
    if with_stats:
        rows = new_rows(x, N, acc, with_stats)
    else:
        rows = x.new_empty(N, dtype=acc), None, x.new_empty((3, N), dtype=acc), None, None
    parts = _forward(rows, logits, options, with_stats, launch)
    if parts and len(target) > MERGE_AND_REDUCE_ROWS:
        _merge(target, parts, rows, options, with_stats)
        parts = None
    shares = target, weight if probs is None else None, token_weight, normalizer
    return rows, reduce(rows, shares, options, mean=mean, out_dtype=out_dtype, parts=parts, with_stats=with_stats)


def reduce(rows, shares, options, *, mean, dtype=None, out_dtype=None, parts=None, with_stats=False):
    """(total, the factor of every row's gradient of the total, number of kept rows (int64)), all 0-d.

    `shares` are (target, class weight, token weight, normalizer); all but the target may be None. The total is the sum
    of the kept rows' losses, times their token weights. For "mean" it is divided by the normalizer (a number or 0-d
    tensor), or else by the sum of the kept rows' shares: token weight times the target's class weight.
    `parts`, if given, are merged into the rows by the same kernel. Without statistics, the number of kept rows is None.
    Without rows, the total is None and `dtype` is the dtype of sums.
    """
    target, weight, token_weight, normalizer = shares
    N, total = len(target), None
    if rows is not None:
        dtype = rows[0].dtype
        total = target.new_empty((), dtype=out_dtype or dtype)
    factor, num_tokens = target.new_empty((), dtype=dtype), target.new_empty(()) if with_stats else None
    tensor, number = None, None
    if not mean:
        weight = None
    elif isinstance(normalizer, torch.Tensor):
        tensor = normalizer
    elif normalizer is not None:
        number = float(normalizer)
    programs = prepare.reduce_programs(N)
    sums = None if programs == 1 else (target.new_empty((2, programs), dtype=dtype), target.new_empty(programs))
    reduce_rows = prepare.reduce(
        N, 0 if weight is None else len(weight), row_stride(token_weight), (mean, number is not None, with_stats),
        options.ignore_index, chip_of(target.device),
    )  # fmt: skip
    into = row_pointers(rows, with_stats) if parts else rows and rows[:1]
    out = total, factor, num_tokens
    reduce_rows(target, weight, token_weight, tensor, number or 1.0, into, parts and _parts(parts), sums, out)
    if sums:
        prepare.total(programs, (mean, number is not None))(*sums, tensor, number or 1.0, out)
    return out


def new_parts(x, parts, with_stats):
    """Allocates what `forward_part` writes for `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    N = x.shape[:-1].numel()
    argmax = x.new_empty((parts, N if with_stats else 0), dtype=torch.int64)
    return x.new_empty((5, parts, N), dtype=acc_dtype(x.dtype)), argmax


def forward_part(logits, options, *, parts, part, block, with_stats=False, launch=None):
    """Writes the sums over one block of the vocabulary into number `part` of `parts`.

    `logits` have only the block's classes, which begin at `block.first_class` of `block.classes`.
    """
    x, target, weight, probs = logits
    if len(target) == 0:
        return
    partial, argmax = parts
    into = partial[:, part:], argmax[part:], partial.stride(0)
    forward_block = prepare.forward(
        form_of(x), form_of(probs), form_of(weight), options, with_stats, tuple(block), launch, chip_of(x.device)
    )
    forward_block(x, probs, target, weight, None, into)


def combine(parts):
    """The sums over all parts, as one part: ((5, 1, N), (1, N))."""
    (largest, s, r, mass, d), argmax = parts
    if len(largest) == 1:
        return parts
    most, at = largest.max(0, keepdim=True)
    down = _shift(largest) - _shift(most)
    power = down.exp2()
    sums = s * power, r + mass * down, mass, power * (d + s * down)
    partial = torch.stack([most, *(each.sum(0, keepdim=True) for each in sums)])
    return partial, argmax.gather(0, at) if argmax.shape[1] else argmax[:1]


def _shift(largest):
    """The shift that `whole_shift` gives for a largest logit."""
    return (largest * LOG2E.value).floor_().clamp_(min=LOWEST.value)


def merge(target, parts, options, *, with_stats=False):
    """Merges all parts into what `forward` returns."""
    partial, _ = parts
    rows = new_rows(partial, partial.shape[2], partial.dtype, with_stats)
    if partial.shape[2]:
        _merge(target, parts, rows, options, with_stats)
    return rows


def _parts(parts):
    """The arguments of `merge_rows` for these parts."""
    partial, argmax = parts
    return partial, argmax, partial.shape[1]


def _merge(target, parts, rows, options, with_stats):
    merge_rows = prepare.merge(len(target), options.ignore_index, with_stats, chip_of(target.device))
    merge_rows(target, row_pointers(rows, with_stats), _parts(parts))


def backward(upstream, logits, saved, options, *, dx, dprobs, block=None, launch=None):
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`.

    `upstream` has the gradients dloss, dlse and dentropy, and what multiplies dloss: factor and token_weight.
    `saved` has the rows' norm and entropy. `block` is as in `forward_part`; without it, `x` has all classes.
    """
    x, target, weight, probs = logits
    if x.numel() == 0:
        return
    dloss = x.new_zeros((), dtype=saved.norm.dtype) if upstream.dloss is None else upstream.dloss
    upstream = dloss, upstream.factor, upstream.token_weight, upstream.dlse, upstream.dentropy
    entropy = None if upstream[4] is None else saved.entropy
    gradients = prepare.backward(
        (form_of(x), form_of(probs), form_of(dx), form_of(dprobs), form_of(weight)),
        row_strides(upstream), entropy is not None, options, block and tuple(block), launch, chip_of(x.device),
    )  # fmt: skip
    gradients(x, probs, dx, dprobs, target, weight, (saved.norm, entropy), upstream)


def can_one_pass(x, probs=None):
    """Whether the one-pass kernel takes these tensors: classes are contiguous, and targets are indices."""
    return probs is None and x.stride(-1) == 1


def forward_backward(upstream, logits, options, *, dx, dz=None, with_stats=False, launch=None):
    """The rows of `forward`; writes into `dx` (which may be `x`) the gradient of sum(g * loss + z_loss * dz * lse^2).

    g is `upstream.dloss`, times `factor` and `token_weight` where they are given. Each row is read from device memory
    once, and from the cache for the gradient. Where classes are strided or targets are probabilities, it is read from
    device memory twice.
    """
    x, target, weight, probs = logits
    if not can_one_pass(x, probs) or dx.stride(-1) != 1:
        rows = forward(logits, options, with_stats=with_stats)
        upstream = upstream._replace(dlse=None if dz is None else 2.0 * options.z_loss * rows[1] * dz)
        backward(upstream, logits, Saved(rows[2], None), options, dx=dx, dprobs=None)
        return rows
    rows = new_rows(x, len(target), acc_dtype(x.dtype), with_stats)
    if len(target) == 0:
        return rows
    upstream = upstream.dloss, upstream.factor, upstream.token_weight, dz, None
    both = prepare.one_pass(
        form_of(x), form_of(dx), form_of(weight), row_strides(upstream), options, with_stats, launch,
        chip_of(x.device),
    )  # fmt: skip
    both(x, dx, target, weight, row_pointers(rows, with_stats), upstream)
    return rows


def forward_backward_reduce(
    logits, token_weight, normalizer, options, *, dx, mean, divide=True, out_dtype=None, with_stats=False
):  # fmt: skip
    """(rows, what `reduce` returns); writes the gradient of the total into `dx`.

    With divide=False, that gradient is not divided as "mean" would: the caller multiplies it by the returned factor.
    """
    x, target, weight, probs = logits
    shares = target, weight if probs is None else None, token_weight, normalizer
    _, factor, _ = reduce(None, shares, options, mean=mean and divide, dtype=acc_dtype(x.dtype))
    upstream = Upstream(factor, None, None, None, token_weight)
    rows = forward_backward(upstream, logits, options, dx=dx, with_stats=with_stats)
    return rows, reduce(rows, shares, options, mean=mean, out_dtype=out_dtype, with_stats=with_stats)


def scale(dx, factor, dloss, *, out=None):
    """`dx * dloss * factor`, in place or into `out`; a factor of None is 1.

    In place, nothing is read or written if `dloss * factor` is 1. `dx` may have any number of dimensions if it is
    contiguous.
    """
    if dx.numel() == 0:
        return
    into = dx if out is None else out
    if dx.dim() != 3:
        dx, into = (t.view(1, -1, t.shape[-1] if t.dim() else 1) for t in (dx, into))
    multiply = prepare.scale(form_of(dx), form_of(into), out is None, chip_of(dx.device))
    multiply(dx, into, dloss, factor)
