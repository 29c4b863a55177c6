"""Prepares the arguments of the kernels from tensors and options."""

from typing import NamedTuple

import torch

from .launch import ACCESS
from .structs import Options, Rows, Strides


def form_of(x):
    """The properties of a tensor that a launch depends on, as the fields of a `Form`; None for None."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % ACCESS)


class Form(NamedTuple):
    """The layout of a tensor in three dimensions: (V,) and (N, V) are taken as (1, 1, V) and (1, N, V)."""

    shape: tuple[int, ...]
    strides: Strides
    dtype: torch.dtype
    begins: int  # its address, modulo ACCESS bytes

    @classmethod
    def of(cls, form):
        if form is None:
            return None
        shape, strides, *others = form
        missing = 3 - len(shape)
        return cls((1,) * missing + tuple(shape), Strides(*(0,) * missing, *strides), *others)

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def contiguous(self):
        """Whether neighbouring classes are adjacent in memory."""
        return self.strides.v == 1


def aligned(*forms):
    """Whether every row of these tensors begins at a multiple of ACCESS bytes; None stands for no tensor."""
    for form in forms:
        if form is not None:
            per_access = ACCESS // form.itemsize
            if form.begins or form.strides.b % per_access or form.strides.t % per_access:
                return False
    return True


def aligned_alike(x, dx):
    """Whether every row of one tensor begins as far from a multiple of ACCESS bytes as that row of the other."""
    per_access = ACCESS // x.itemsize
    b, t = x.strides.b - dx.strides.b, x.strides.t - dx.strides.t
    return x.dtype == dx.dtype and x.begins == dx.begins and b % per_access == 0 and t % per_access == 0


def strides_of(form):
    return Strides(0, 0, 0) if form is None else form.strides


def row_stride(x):
    """The stride of a tensor (N,); 0 for a scalar and for None."""
    return 0 if x is None or x.dim() == 0 else x.stride(0)


def row_strides(tensors):
    return tuple([0 if x is None or x.dim() == 0 else x.stride(0) for x in tensors])


def acc_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Scalars(NamedTuple):
    """The options that are numbers, as the kernels take them."""

    smoothing: float
    scale: float
    cap: float


def scalars_of(options):
    """With a softcap, `cap * tanh(scale * x)` is used; without one, `scale * x`."""
    smoothing, softcap, scale = options.label_smoothing, options.softcap, options.logit_scale
    return Scalars(smoothing, scale, 1.0) if softcap is None else Scalars(smoothing, scale / softcap, softcap)


def flags_of(options, probs=None, with_stats=False):
    """The options that a kernel is compiled for."""
    soft, capped = options.label_smoothing != 0.0 or probs is not None, options.softcap is not None
    return Options(soft, not capped and options.logit_scale != 1.0, capped, with_stats)


def new_rows(x, N, dtype, with_stats):
    """New tensors for the results of rows; without statistics, those of statistics are empty."""
    stats = N if with_stats else 0
    loss = x.new_empty(N, dtype=dtype)
    predicted = x.new_empty(stats, dtype=torch.int64)
    return Rows(loss, loss.new_empty(N), loss.new_empty(3, N), predicted, loss.new_empty(stats))


def row_pointers(rows, with_stats):
    """The rows as kernels take them."""
    return rows if with_stats else Rows(rows.loss, rows.lse, rows.norm, None, None)
