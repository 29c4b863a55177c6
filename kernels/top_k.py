"""Launchers for a teacher that is known by its likeliest classes: what all other classes of rows add to a loss.

Logits are (N, V) with any strides; `target` is (N,) int64 and contiguous. An ignored row has
`target == options.ignore_index`. `options`, a hashable object, has ignore_index, softcap and logit_scale. There are one
or two `temperatures`.
"""

import torch

from . import prepare_distillation as prepare
from .arguments import acc_dtype, form_of
from .chip import chip_of
from .distillation_structs import OtherRows
from .structs import Gradients, Logits

#: Integers of the bytes of a logit.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def take_out(x, ids, options):
    """Overwrites the logits of the classes `ids` (N, K) by what the kernels know from all logits that there may be."""
    if options.softcap is None and options.logit_scale == 1.0:
        x.scatter_(1, ids, float("-inf"))
    else:
        x.view(INTEGERS[x.element_size()]).scatter_(1, ids, -1)


def forward(x, target, options, temperatures, *, with_stats):
    """The sums over the classes that were not taken out, as `OtherRows`. Nothing is written for ignored rows."""
    N = len(target)
    saved = x.new_empty((1 + len(temperatures), N), dtype=acc_dtype(x.dtype))
    predicted, entropy = (target.new_empty(N), saved.new_empty(N)) if with_stats else (None, None)
    rows = OtherRows(saved, predicted, entropy)
    prepared = prepare.others(form_of(x), options, tuple(temperatures), with_stats, chip_of(x.device))
    prepared(x.device, Logits(x, None), target, rows)
    return rows


def backward(factors, x, target, saved, options, temperatures, *, dx):
    """Writes the gradient of `sum(log(sums) * factors)` into dx, which may be x; zeros in ignored rows.

    `factors` are (len(temperatures), N), float64. For the classes that were taken out, 0 or NaN is written.
    """
    prepared = prepare.others_backward(form_of(x), form_of(dx), options, tuple(temperatures), chip_of(x.device))
    prepared(x.device, Logits(x, None), Gradients(dx, None), target, saved, factors)
