"""Launchers: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

`logits` are (x, target, class weights or None, probabilities or None). `x` and the probabilities are (B, T, V), (N, V)
or (V,) with any strides, and `target` is (N,) int64 and contiguous, for N = B * T. An ignored row has
`target == options.ignore_index`. `options`, a hashable object, has ignore_index, label_smoothing, softcap, logit_scale
and z_loss.

Functions whose names begin with an underscore prepare launches: pairs of a kernel and its arguments. The others launch
them, so that a launch is one call away from the package.
"""

import torch
import triton

from . import prepare
from .arguments import acc_dtype, form_of, new_rows, row_pointers, row_stride, row_strides
from .chip import chip_of
from .forward import forward_kernel
from .launch import MERGE_AND_REDUCE_ROWS
from .parts import combine as combine  # a backend offers these two
from .parts import new_parts as new_parts
from .parts import parts_of
from .structs import (
    Gradients,
    Logits,
    OnePassUpstream,
    Part,
    Product,
    ProgramSums,
    Rows,
    Saved,
    Shares,
    Targets,
    Totals,
    Upstream,
)


def interpreted():
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    return not isinstance(forward_kernel, triton.JITFunction)


def _forward(logits, rows_out, options, with_stats, launch):
    """(launches, parts): a launch that fills the rows, or the parts that have to be merged into them."""
    x, target, weight, probs = logits
    forward_rows = prepare.forward(
        form_of(x), form_of(probs), form_of(weight), options, with_stats, None, launch, chip_of(x.device)
    )
    inputs = Logits(x, probs), Targets(target, weight)
    if forward_rows.splits == 1:
        return [(forward_rows, (*inputs, rows_out, None))], None
    sums, argmax = new_parts(x, forward_rows.splits, with_stats)
    return [(forward_rows, (*inputs, None, Part(sums, argmax, sums.stride(0))))], (sums, argmax)


def _merge(target, parts, rows_out, options, with_stats):
    """A launch that merges the parts into the rows."""
    merge_rows = prepare.merge(len(target), options, with_stats, chip_of(target.device))
    return merge_rows, (target, rows_out, parts_of(parts))


def forward(logits, options, *, with_stats=False, launch=None):
    """Row losses and what backward needs: (loss, lse, norm, predicted, entropy)."""
    x, target, *_ = logits
    rows = new_rows(x, len(target), acc_dtype(x.dtype), with_stats)
    if len(target) == 0:
        return rows
    rows_out = row_pointers(rows, with_stats)
    launches, parts = _forward(logits, rows_out, options, with_stats, launch)
    if parts:
        launches.append(_merge(target, parts, rows_out, options, with_stats))
    for kernel, arguments in launches:
        kernel(x.device, *arguments)
    return rows


def forward_reduce(
    logits, token_weight, normalizer, options, *, mean, out_dtype=None, with_stats=False, launch=None
):  # fmt: skip
    """(what `forward` returns, what `reduce` returns), in two launches unless rows are very many (see `reduce.py`).

    Without statistics, the rows have only losses and norm. As in PyTorch, class weights enter the divisor of "mean"
    for index targets only.
    """
    x, target, *_ = logits
    N, acc = len(target), acc_dtype(x.dtype)
    if with_stats:
        rows = new_rows(x, N, acc, with_stats)
    else:
        loss = x.new_empty(N, dtype=acc)
        rows = Rows(loss, None, loss.new_empty(3, N), None, None)
    launches, parts = _forward(logits, rows, options, with_stats, launch) if N else ([], None)
    if parts and N > MERGE_AND_REDUCE_ROWS:
        launches.append(_merge(target, parts, rows, options, with_stats))
        parts = None
    totals, reduction = _reduce(
        rows, _shares(logits, token_weight, normalizer), options, mean, acc, out_dtype, parts, with_stats
    )
    for kernel, arguments in (*launches, *reduction):
        kernel(x.device, *arguments)
    return rows, totals


def reduce(rows, shares, options, *, mean, dtype=None, out_dtype=None, with_stats=False):
    """(total, the factor of every row's gradient of the total, number of kept rows (int64)), all 0-d.

    `rows` begin with losses. `shares` are (target, class weight, token weight, normalizer); all but the target may be
    None. The total is the sum of the kept rows' losses, times their token weights. For "mean" it is divided by the
    normalizer (a number or 0-d tensor), or else by the sum of the kept rows' shares: token weight times the target's
    class weight. Without statistics, the number of kept rows is None. Without rows, the total is None and `dtype` is
    the dtype of sums.
    """
    target, *_ = shares
    if rows is not None:
        loss, *_ = rows
        rows, dtype = Rows(loss, None, None, None, None), loss.dtype
    totals, launches = _reduce(rows, shares, options, mean, dtype, out_dtype, None, with_stats)
    for kernel, arguments in launches:
        kernel(target.device, *arguments)
    return totals


def _shares(logits, token_weight, normalizer):
    """The shares of rows, as `reduce` takes them."""
    _, target, weight, probs = logits
    return target, weight if probs is None else None, token_weight, normalizer


def _reduce(rows, shares, options, mean, acc, out_dtype, parts, with_stats):
    """(`Totals`, launches that compute them). `parts`, if given, are merged into the rows by the same kernel."""
    target, weight, token_weight, normalizer = shares
    N, device, number = len(target), target.device, None
    if not mean:
        weight = normalizer = None
    elif normalizer is not None and not isinstance(normalizer, torch.Tensor):
        number, normalizer = float(normalizer), None
    total = None if rows is None else target.new_empty((), dtype=out_dtype or acc)
    out = Totals(total, target.new_empty((), dtype=acc), target.new_empty(()) if with_stats else None)
    programs, divided = prepare.reduce_programs(N), (mean, number is not None, with_stats)
    reduce_rows = prepare.reduce(
        N, 0 if weight is None else len(weight), row_stride(token_weight), divided, options, chip_of(device),
    )  # fmt: skip
    number = 1.0 if number is None else number
    shares = Shares(target, weight, token_weight, normalizer)
    if parts is not None:
        parts = parts_of(parts)
    elif rows is not None:
        rows = Rows(rows.loss, None, None, None, None)
    if programs == 1:
        return out, [(reduce_rows, (shares, number, rows, parts, None, out))]
    sums = ProgramSums(target.new_empty((2, programs), dtype=acc), target.new_empty(programs))
    add_sums = prepare.total(programs, divided)
    return out, [
        (reduce_rows, (shares, number, rows, parts, sums, out)),
        (add_sums, (sums, normalizer, number, out)),
    ]


def forward_part(logits, options, *, parts, part, block, with_stats=False, launch=None):
    """Writes the sums over one block of the vocabulary into number `part` of `parts`.

    `logits` have only the block's classes, which begin at `block.first_class` of `block.classes`.
    """
    x, target, weight, probs = logits
    if len(target) == 0:
        return
    sums, argmax = parts
    forward_block = prepare.forward(
        form_of(x), form_of(probs), form_of(weight), options, with_stats, tuple(block), launch, chip_of(x.device)
    )
    part_out = Part(sums[:, part:], argmax[part:], sums.stride(0))
    forward_block(x.device, Logits(x, probs), Targets(target, weight), None, part_out)


def merge(target, parts, options, *, with_stats=False):
    """Merges all parts into what `forward` returns."""
    sums, _ = parts
    N = len(target)
    rows = new_rows(sums, N, sums.dtype, with_stats)
    if N:
        merge_rows, arguments = _merge(target, parts, row_pointers(rows, with_stats), options, with_stats)
        merge_rows(target.device, *arguments)
    return rows


def backward(upstream, logits, saved, options, *, dx, dprobs, block=None, launch=None):
    """Writes the gradients into `dx` and `dprobs`; either may be None, and `dx` may be `x`.

    `upstream` has the gradients dloss, dlse and dentropy, and what multiplies dloss: factor and token_weight.
    `saved` has the rows' norm and entropy. `block` is as in `forward_part`; without it, `x` has all classes.
    """
    x, target, weight, probs = logits
    dentropy = upstream.dentropy
    if x.numel() == 0:
        return
    dloss = x.new_zeros((), dtype=saved.norm.dtype) if upstream.dloss is None else upstream.dloss
    upstream = Upstream(dloss, upstream.factor, upstream.token_weight, upstream.dlse, dentropy)
    gradients = prepare.backward(
        (form_of(x), form_of(probs), form_of(dx), form_of(dprobs), form_of(weight)),
        row_strides(upstream), dentropy is not None, options, block and tuple(block), launch, chip_of(x.device),
    )  # fmt: skip
    saved = Saved(saved.norm, None if dentropy is None else saved.entropy)
    gradients(x.device, Logits(x, probs), Gradients(dx, dprobs), Targets(target, weight), saved, upstream)


def can_one_pass(x, probs=None):
    """Whether the one-pass kernel takes these tensors: classes are contiguous, and targets are indices."""
    return probs is None and x.stride(-1) == 1


def _one_pass(upstream, logits, options, dx, with_stats, launch=None):
    """(rows, launches that fill them and write the gradient into `dx`)."""
    x, target, weight, _ = logits
    rows = new_rows(x, len(target), acc_dtype(x.dtype), with_stats)
    if len(target) == 0:
        return rows, []
    both = prepare.one_pass(
        form_of(x), form_of(dx), form_of(weight), row_strides(upstream), options, with_stats, launch,
        chip_of(x.device),
    )  # fmt: skip
    rows_out = row_pointers(rows, with_stats)
    return rows, [(both, (Logits(x, None), Gradients(dx, None), Targets(target, weight), rows_out, upstream))]


def forward_backward(upstream, logits, options, *, dx, dz=None, with_stats=False, launch=None):
    """The rows of `forward`; writes into `dx` (which may be `x`) the gradient of sum(g * loss + z_loss * dz * lse^2).

    g is `upstream.dloss`, times `factor` and `token_weight` where they are given. Each row is read from device memory
    once, and from the cache for the gradient. Where classes are strided or targets are probabilities, it is read from
    device memory twice.
    """
    x, _, _, probs = logits
    if not can_one_pass(x, probs) or not can_one_pass(dx):
        rows = forward(logits, options, with_stats=with_stats)
        dlse = None if dz is None else 2.0 * options.z_loss * rows.lse * dz
        upstream = Upstream(upstream.dloss, upstream.factor, upstream.token_weight, dlse, None)
        backward(upstream, logits, Saved(rows.norm, None), options, dx=dx, dprobs=None)
        return rows
    upstream = OnePassUpstream(upstream.dloss, upstream.factor, upstream.token_weight, dz)
    rows, launches = _one_pass(upstream, logits, options, dx, with_stats, launch)
    for kernel, arguments in launches:
        kernel(dx.device, *arguments)
    return rows


def forward_backward_reduce(
    logits, token_weight, normalizer, options, *, dx, mean, divide=True, out_dtype=None, with_stats=False
):
    """(rows, what `reduce` returns); writes the gradient of the total into `dx`.

    With divide=False, that gradient is not divided as "mean" would: the caller multiplies it by the returned factor.
    """
    x, _, _, probs = logits
    device, acc = dx.device, acc_dtype(x.dtype)
    shares = _shares(logits, token_weight, normalizer)
    divisor, launches = _reduce(None, shares, options, mean and divide, acc, None, None, False)
    for kernel, arguments in launches:
        kernel(device, *arguments)
    if can_one_pass(x, probs) and can_one_pass(dx):
        upstream = OnePassUpstream(divisor.factor, None, token_weight, None)
        rows, launches = _one_pass(upstream, logits, options, dx, with_stats)
        for kernel, arguments in launches:
            kernel(device, *arguments)
    else:
        rows = forward(logits, options, with_stats=with_stats)
        upstream = Upstream(divisor.factor, None, token_weight, None, None)
        backward(upstream, logits, Saved(rows.norm, None), options, dx=dx, dprobs=None)
    totals, launches = _reduce(rows, shares, options, mean, acc, out_dtype, None, with_stats)
    for kernel, arguments in launches:
        kernel(device, *arguments)
    return rows, totals


def scale(dx, factor, dloss, *, out=None):
    """`dx * dloss * factor`, in place or into `out`; a factor of None is 1.

    In place, nothing is read or written if `dloss * factor` is 1. `dx` may have any number of dimensions if it is
    contiguous.
    """
    if dx.numel() == 0:
        return
    into = dx if out is None else out
    if dx.dim() != 3:
        dx, into = (t.view(1, -1, t.size(-1) if t.dim() else 1) for t in (dx, into))
    multiply = prepare.scale(form_of(dx), form_of(into), out is None, chip_of(dx.device))
    multiply(dx.device, Product(dx, into, dloss, factor))
