"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`x` and `probs` are (B, T, V) with any strides, `target` is (B * T,) int64 and contiguous; an ignored row has
`target == options.ignore_index`. `options` has ignore_index, label_smoothing, softcap and logit_scale.
"""

from collections import namedtuple

import torch
import triton

from . import prepare
from .arguments import acc_dtype, form_of, new_rows, on, row_pointers, strides_of_rows
from .device_math import LOG2E, LOWEST
from .forward import forward_kernel
from .launch import MERGE_AND_REDUCE_ROWS, chip_of

#: What `backward` needs of the rows, as callers have it in an object of their own.
Saved = namedtuple("Saved", "shift mass entropy")


def interpreted():
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _split_forward(x, target, weight, probs, options, with_stats, launch):
    """(rows, parts): the kernel has filled one of them, and parts are None or what is to be merged into the rows."""
    N = x.shape[0] * x.shape[1]
    rows = new_rows(x, N, acc_dtype(x.dtype), with_stats)
    if N == 0:
        return rows, None
    forward_rows = prepare.forward(
        form_of(x), form_of(probs), form_of(weight), options, with_stats, None, launch, chip_of(x.device)
    )
    parts = new_parts(x, forward_rows.splits, with_stats) if forward_rows.splits > 1 else None
    with on(x.device):
        if parts is None:
            forward_rows(x, probs, target, weight, row_pointers(rows, with_stats), None)
        else:
            forward_rows(x, probs, target, weight, None, (*parts, parts[0].stride(0)))
    return rows, parts


def forward(x, target, weight, probs, options, *, with_stats=False, launch=None):
    """Row losses and what backward needs: (loss, lse, shift, mass, predicted, entropy)."""
    rows, parts = _split_forward(x, target, weight, probs, options, with_stats, launch)
    if parts:
        _merge(target, parts, rows, options, with_stats)
    return rows


def forward_reduce(
    x, target, weight, probs, token_weight, normalizer, options, *,
    mean, z_loss=0.0, out_dtype=None, with_stats=False, launch=None,
):  # fmt: skip
    """(what `forward` returns, what `reduce` returns), in two launches.

    Class weights enter the divisor of "mean" for index targets only, as PyTorch has it.
    """
    rows, parts = _split_forward(x, target, weight, probs, options, with_stats, launch)
    if parts and len(target) > MERGE_AND_REDUCE_ROWS:
        _merge(target, parts, rows, options, with_stats)
        parts = None
    class_weight = weight if probs is None else None
    how = {"mean": mean, "z_loss": z_loss, "out_dtype": out_dtype, "first_class": 0, "target_weight": None}
    return rows, _reduce(rows, parts, target, class_weight, token_weight, normalizer, options, with_stats, **how)


def new_parts(x, parts, with_stats):
    """Room for what `forward_part` leaves of `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    N = x.shape[0] * x.shape[1]
    argmax = x.new_empty((parts, N if with_stats else 0), dtype=torch.int64)
    return x.new_empty((5, parts, N), dtype=acc_dtype(x.dtype)), argmax


def forward_part(x, target, weight, probs, options, *, parts, part, block, with_stats=False, launch=None):
    """The sums over one block of the vocabulary, into number `part` of `parts`.

    `x`, `weight` and `probs` are the block's, which begins at `block.first_class` of `block.classes`.
    """
    if x.shape[0] * x.shape[1] == 0:
        return
    partial, argmax = parts
    into = partial[:, part:], argmax[part:], partial.stride(0)
    forward_block = prepare.forward(
        form_of(x), form_of(probs), form_of(weight), options, with_stats, tuple(block), launch, chip_of(x.device)
    )
    with on(x.device):
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
    """What `forward` returns, from all parts."""
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
    with on(target.device):
        merge_rows(target, row_pointers(rows, with_stats), _parts(parts))


def backward(upstream, x, target, weight, probs, saved, options, *, dx, dprobs, block=None, launch=None):
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`.

    `upstream` has the gradients dloss, dlse and dentropy, and what multiplies dloss: factor and token_weight.
    `saved` has shift, mass and entropy of the rows, `block` is as in `forward_part`: without it, `x` has all classes.
    """
    if x.numel() == 0:
        return
    dloss = x.new_zeros((), dtype=saved.mass.dtype) if upstream.dloss is None else upstream.dloss
    of_rows = dloss, upstream.factor, upstream.token_weight, upstream.dlse, upstream.dentropy
    has_dentropy = upstream.dentropy is not None
    gradients = prepare.backward(
        form_of(x), form_of(probs), form_of(dx), form_of(dprobs), form_of(weight), strides_of_rows(of_rows),
        has_dentropy, options, block and tuple(block), launch, chip_of(x.device),
    )  # fmt: skip
    with on(x.device):
        gradients(
            x, probs, dx, dprobs, target, weight,
            (saved.shift, saved.mass, saved.entropy if has_dentropy else None), of_rows,
        )  # fmt: skip


def can_one_pass(x, probs=None):
    """Whether `forward_backward` takes these: rows of contiguous classes with index targets."""
    return probs is None and x.stride(2) == 1


def forward_backward(upstream, x, target, weight, probs, options, *, dx, dz=None, with_stats=False, launch=None):
    """The rows of `forward`; writes into `dx` (which may be `x`) the gradient of sum(g * loss + z_loss * dz * lse^2).

    g is `upstream.dloss`, times `factor` and `token_weight` where they are there. Each row is read from device memory
    once, and the gradient takes it from the cache; but twice where classes are strided or targets are probabilities.
    """
    if not can_one_pass(x, probs) or dx.stride(2) != 1:
        rows = forward(x, target, weight, probs, options, with_stats=with_stats)
        upstream = upstream._replace(dlse=None if dz is None else 2.0 * options.z_loss * rows[1] * dz)
        backward(upstream, x, target, weight, probs, Saved(rows[2], rows[3], None), options, dx=dx, dprobs=None)
        return rows
    rows = new_rows(x, x.shape[0] * x.shape[1], acc_dtype(x.dtype), with_stats)
    if len(target) == 0:
        return rows
    of_rows = upstream.dloss, upstream.factor, upstream.token_weight, dz, None
    both = prepare.one_pass(
        form_of(x), form_of(dx), form_of(weight), strides_of_rows(of_rows), options, with_stats, launch,
        chip_of(x.device),
    )  # fmt: skip
    with on(x.device):
        both(x, dx, target, weight, row_pointers(rows, with_stats), of_rows)
    return rows


def reduce(
    loss, lse, target, weight, token_weight, normalizer, options, *,
    mean, z_loss=0.0, out_dtype=None, target_weight=None, first_class=0,
):  # fmt: skip
    """(total, number of kept rows (int64), what every row's gradient of the total is multiplied by), all 0-d.

    The total is the sum of the kept rows' losses, times their token weights; divided, for "mean", by `normalizer` (a
    number or 0-d tensor) or by the sum of the kept rows' shares: token weight times the target's class weight, of
    which there is either `weight`, of all classes from `first_class` on, or `target_weight`, of each row. A `z_loss`
    is added, times the squares of `lse`; "mean" divides it by the token weights alone.
    """
    rows = loss, lse
    how = {"mean": mean, "z_loss": z_loss, "out_dtype": out_dtype, "first_class": first_class}
    return _reduce(
        rows, None, target, weight, token_weight, normalizer, options, False, target_weight=target_weight, **how
    )


def _reduce(
    rows, parts, target, weight, token_weight, normalizer, options, with_stats, *,
    mean, z_loss, out_dtype, target_weight, first_class,
):  # fmt: skip
    """Reduces rows, or parts, which are then merged into the rows on the way."""
    loss, N = rows[0], len(target)
    out = loss.new_empty((), dtype=out_dtype or loss.dtype), target.new_empty(()), loss.new_empty(())
    tensor = normalizer if mean and isinstance(normalizer, torch.Tensor) else None
    has_number = bool(mean) and normalizer is not None and tensor is None
    number = float(normalizer) if has_number else 1.0
    present = bool(mean), has_number, z_loss != 0.0, with_stats
    weights = (weight if mean else None, target_weight if mean else None, token_weight)
    place = first_class, 0 if weight is None else len(weight), 0 if token_weight is None else token_weight.stride(0)
    programs = prepare.reduce_programs(N)
    sums = None if programs == 1 else (loss.new_empty((4, programs)), target.new_empty(programs))
    reduce_rows = prepare.reduce(N, place, z_loss, present, options.ignore_index, chip_of(loss.device))
    into = rows[:2] if parts is None else row_pointers(rows, with_stats)
    with on(loss.device):
        reduce_rows(into, parts and _parts(parts), target, weights, tensor, sums, out, number)
        if sums:
            prepare.total(programs, z_loss, present)(*sums, tensor, out, number)
    return out


def scale(dx, factor, dloss, *, out=None):
    """`dx * dloss * factor`, in place or into `out`; a factor of None is 1. In place, a product of 1 moves nothing.

    `dx` may have any number of dimensions if it is contiguous.
    """
    if dx.numel() == 0:
        return
    into = dx if out is None else out
    if dx.dim() != 3:
        dx, into = (t.view(1, -1, t.shape[-1] if t.dim() else 1) for t in (dx, into))
    multiply = prepare.scale(form_of(dx), form_of(into), out is None, chip_of(dx.device))
    with on(dx.device):
        multiply(dx, into, dloss, factor)
