"""The sums over parts of rows, on the host: allocated before kernels fill them, and combined."""

from math import prod

import torch

from .arguments import acc_dtype
from .device_math import LOG2E, LOWEST
from .structs import Parts


def new_parts(x, parts, with_stats):
    """Allocates what `forward_part` writes for `parts` blocks: (partial (5, parts, N), argmax (parts, N))."""
    *sizes, _ = x.shape
    N = prod(sizes)
    argmax = x.new_empty((parts, N if with_stats else 0), dtype=torch.int64)
    return x.new_empty((5, parts, N), dtype=acc_dtype(x.dtype)), argmax


def parts_of(parts):
    """The parts as kernels take them."""
    sums, argmax = parts
    _, count, _ = sums.shape
    return Parts(sums, argmax, count)


def combine(parts):
    """The sums over all parts, as one part: ((5, 1, N), (1, N))."""
    (largest, s, r, mass, d), argmax = parts
    if len(largest) == 1:
        return parts
    most, at = largest.max(0, keepdim=True)
    down = _shift(largest) - _shift(most)
    power = down.exp2()
    sums = s * power, r + mass * down, mass, power * (d + s * down)
    merged = torch.stack([most, *(each.sum(0, keepdim=True) for each in sums)])
    return merged, argmax.gather(0, at) if argmax.numel() else argmax.narrow(0, 0, 1)


def _shift(largest):
    """The shift that `whole_shift` gives for a largest logit."""
    return (largest * LOG2E.value).floor_().clamp_(min=LOWEST.value)
