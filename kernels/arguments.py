"""Prepares the arguments of the kernels from tensors and options."""

from typing import NamedTuple

import torch

from .launch import ACCESS


def form_of(x):
    """The properties of a tensor that a launch depends on, as the fields of a `Form`; None for None."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % ACCESS == 0)


class Form(NamedTuple):
    """The layout of a tensor in three dimensions: (V,) and (N, V) are taken as (1, 1, V) and (1, N, V)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    begins_aligned: bool  # whether its address is a multiple of ACCESS bytes

    @classmethod
    def of(cls, form):
        if form is None:
            return None
        shape, strides, *others = form
        missing = 3 - len(shape)
        return cls((1,) * missing + tuple(shape), (0,) * missing + strides, *others)

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def contiguous(self):
        """Whether neighbouring classes are adjacent in memory."""
        return self.strides[2] == 1


def aligned(*forms):
    """Whether every row of these tensors begins at a multiple of ACCESS bytes; None stands for no tensor."""
    for form in forms:
        if form is not None:
            per_access = ACCESS // form.itemsize
            if not form.begins_aligned or any(stride % per_access for stride in form.strides[:2]):
                return False
    return True


def strides_of(form):
    return (0, 0, 0) if form is None else form.strides


def row_stride(x):
    """The stride of a tensor (N,); 0 for a scalar and for None."""
    return 0 if x is None or x.dim() == 0 else x.stride(0)


def row_strides(tensors):
    return tuple([0 if x is None or x.dim() == 0 else x.stride(0) for x in tensors])


def acc_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalars_of(options, probs):
    """(smoothing, scale, cap) as the kernels take them, and the flags (HAS_SOFT, HAS_SCALE, HAS_SOFTCAP)."""
    smoothing, softcap, scale = options.label_smoothing, options.softcap, options.logit_scale
    soft = smoothing != 0.0 or probs is not None
    if softcap is None:
        return (smoothing, scale, 1.0), (soft, scale != 1.0, False)
    return (smoothing, scale / softcap, softcap), (soft, False, True)


def is_simple(launch, weight, probs, present):
    """Whether few registers suffice: one aligned row per program, no float64, no soft target read from tensors."""
    return launch.BLOCK_N == 1 and launch.WIDTH > 2 and probs is None and not (present[0] and weight is not None)


def new_rows(x, N, dtype, with_stats):
    """New tensors for the results of rows: (loss, lse, norm, predicted, entropy)."""
    stats = N if with_stats else 0
    loss, lse, entropy = (x.new_empty(n, dtype=dtype) for n in (N, N, stats))
    return loss, lse, x.new_empty((3, N), dtype=dtype), x.new_empty(stats, dtype=torch.int64), entropy


def row_pointers(rows, with_stats):
    return rows if with_stats else (*rows[:3], None, None)
