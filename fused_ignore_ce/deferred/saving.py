"""What is saved for the backward of a loss: tensors, and the places of those that lie in a parameter's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .recipe import check_unchanged, version_of

_PLAIN = (Tensor, torch.nn.Parameter)


class Saved:
    """A tensor that a backward needs, copied if it lies in the memory of logits that are about to be written to."""

    def __init__(self, t: Tensor) -> None:
        self._tensor, self._version = t.detach(), version_of(t)

    def copy(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._tensor = self._tensor.clone()
            self._version = version_of(self._tensor)

    def tensor(self) -> Tensor:
        _check_version(self._tensor, self._version)
        return self._tensor


class _InParameter:
    """A saved tensor that lies in the memory of a parameter. Who shards the parameter frees its memory meanwhile."""

    def __init__(self, t: Tensor, parameter: Tensor) -> None:
        self._parameter, self._version = parameter, version_of(parameter)
        self._shape, self._stride = t.shape, t.stride()
        self._offset = t.storage_offset() - parameter.storage_offset()

    def tensor(self) -> Tensor:
        _check_version(self._parameter, self._version)
        check_unchanged(self._parameter, self._version)
        t = self._parameter.detach()
        return t.as_strided(self._shape, self._stride, t.storage_offset() + self._offset)


def _check_version(t: Tensor, version: object) -> None:
    if version_of(t) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(t.shape)} that a loss of the logits keeps; write to it after backward, or to a clone"
        )


def shares_memory(out: object, value: Tensor) -> bool:
    return isinstance(out, Tensor) and out.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()


def _storage(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address


@contextlib.contextmanager
def saving_parameters(parameters: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A context in which parameters are saved for backward in place of the memory that they have in it.

    A checkpoint around it has nothing to compute again.

    Args:
        parameters: parameters, each with the detached tensor that stands for it in this context. After it, those
            tensors have no memory.
    """

    def pack(t: Tensor) -> Saved | _InParameter:
        for parameter, detached in parameters:
            if type(t) in _PLAIN and t.dtype == detached.dtype and _storage(t) == _storage(detached):
                return _InParameter(t, parameter)
        return Saved(t)

    def unpack(saved: Saved | _InParameter) -> Tensor:
        return saved.tensor()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
    for _, detached in parameters:
        detached.data = without_memory(detached)


def without_memory(t: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device, all elements of which are one."""
    return t.detach().new_empty(()).expand(t.shape)
