"""The sums over parts of rows, on the host: allocated before kernels fill them, and combined."""

from math import prod

import torch

from .arguments import acc_dtype, scalars_of
from .device_math import FAR, FAR64, LN2, LOG2E
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


def combine(parts, options):
    """The sums over all parts, as one part: ((5, 1, N), (1, N))."""
    (largest, s, r, mass, d), argmax = parts
    if len(largest) == 1:
        return parts
    cap = largest.new_tensor(scalars_of(options).cap)
    height = cap * LOG2E.value
    coarse = height.log2().floor().exp2()
    nats = cap / coarse
    limit = (FAR64 if largest.dtype == torch.float64 else FAR).value

    def shift_of(largest):
        y = largest * height
        far = (y.abs() >= limit) & largest.isfinite()
        return torch.where(far, largest * coarse, y.floor().clamp_(min=-limit)), far

    # As in `merge.rebase`.
    most, at = largest.max(0, keepdim=True)
    (c, far), (c_new, far_new) = shift_of(largest), shift_of(most)
    same = far == far_new
    unit = torch.where(same, 1.0, torch.where(far, nats / LN2.value, LN2.value / nats))
    down = 0.25 * c * unit - 0.25 * c_new
    power = torch.where(same, (4.0 * down).exp2(), 0.0)
    entropy = torch.where(power == 0.0, 0.0, power * (d + s * 4.0 * down))
    sums = s * power, r * unit + mass * down, mass, entropy
    merged = torch.stack([most, *(each.sum(0, keepdim=True) for each in sums)])
    return merged, argmax.gather(0, at) if argmax.numel() else argmax.narrow(0, 0, 1)
