"""Launchers of distillation: tensors in, tensors out. Shapes, dtypes and option values were checked by the caller.

Logits of both sides are (N, V) with any strides, those of the teacher in a pair with None; `target` is (N,) int64 and
contiguous. An ignored row has `target == options.options.ignore_index`. `options`, a hashable object, has the fields of
`DistillationOptions`.
"""

from . import prepare_distillation as prepare
from .arguments import acc_dtype, form_of, row_stride
from .chip import chip_of
from .distillation_structs import PairLogits, PairRows
from .structs import Gradients


def _launched(x, teacher, target, options, with_stats, scale, dx):
    """The results of rows; writes the gradient of `sum(loss * scale)` into dx, unless that is None."""
    teacher, _ = teacher
    N, acc = len(target), acc_dtype(x.dtype)
    loss, n = x.new_empty(N, dtype=acc), N if with_stats else 0
    saved = loss.new_empty((7, N)) if dx is None else None
    lse, predicted, entropy = loss.new_empty(n), loss.new_empty(n, dtype=target.dtype), loss.new_empty(n)
    if not x.numel():
        for t in (loss, lse, predicted, entropy):
            t.zero_()
    else:
        rows = prepare.distillation(
            form_of(x), form_of(teacher), form_of(dx), row_stride(scale), options, with_stats, chip_of(x.device)
        )
        stats = (lse, predicted, entropy) if with_stats else (None, None, None)
        gradients = None if dx is None else Gradients(dx, None)
        rows(x.device, PairLogits(x, teacher), gradients, target, PairRows(loss, saved, *stats), scale)
    return (loss, lse, predicted, entropy), saved


def forward(x, teacher, target, options, *, with_stats):
    """((loss, lse, predicted, entropy) of rows, what backward needs (7, N)); without statistics, the last are empty."""
    return _launched(x, teacher, target, options, with_stats, None, None)


def backward(dloss, x, teacher, target, saved, options, *, dx):
    """Writes the gradient of `sum(loss * dloss)` into dx, zeros in ignored rows."""
    teacher, _ = teacher
    if x.numel():
        rows = prepare.distillation_backward(
            form_of(x), form_of(teacher), form_of(dx), row_stride(dloss), options, chip_of(x.device)
        )
        rows(x.device, PairLogits(x, teacher), Gradients(dx, None), target, saved, dloss)


def forward_backward(scale, x, teacher, target, options, *, dx, with_stats):
    """(loss, lse, predicted, entropy) of rows; writes the gradient of `sum(loss * scale)` into dx, which may be x."""
    rows, _ = _launched(x, teacher, target, options, with_stats, scale, dx)
    return rows
