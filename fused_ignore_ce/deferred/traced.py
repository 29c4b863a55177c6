"""Deferred logits while torch.compile traces, where tensor subclasses cannot be made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import LOSSES
from .product import Product
from .recording import COMMUTATIVE, RECORDERS, record


class TracedLogits:
    """The counterpart of `DeferredLogits` while tracing: an ordinary object that has the methods that are recorded."""

    def __init__(self, product: Product) -> None:
        self._form = product

    def take_loss(self, lean: Any, dense: Any, operands: list[Tensor]) -> Any:
        """The loss of these logits; the graph that is traced has its gradients."""
        return lean(self._form, *operands)

    @property
    def classes(self) -> int:
        return self._form.weight.shape[0]

    def materialize(self, reader: str = "materialize") -> Tensor:
        return self._form.logits()

    @property
    def shape(self) -> torch.Size:
        return self._form.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._form.dtype

    @property
    def device(self) -> torch.device:
        return self._form.hidden.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def is_contiguous(self) -> bool:
        return not self._form.classes_second

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and isinstance(args[0], TracedLogits) and name in ("add", "__add__"):
            done = self._form.plus(args[0]._form)
        else:
            done = record(self._form, name, args, kwargs)
        if done is None:
            args = tuple(a.materialize() if isinstance(a, TracedLogits) else a for a in args)
            return getattr(self._form.logits(), name)(*args, **kwargs)
        return tuple(TracedLogits(p) for p in done) if isinstance(done, list) else TracedLogits(done)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOSSES and args and isinstance(args[0], TracedLogits):
            return LOSSES[func](*args, **kwargs)
        name = func.__name__
        if name in COMMUTATIVE and len(args) == 2 and not isinstance(args[0], TracedLogits):
            args = args[::-1]
        if isinstance(args[0], TracedLogits) and name in RECORDERS:
            return args[0]._call(name, args[1:], kwargs)
        args = tuple(a.materialize() if isinstance(a, TracedLogits) else a for a in args)
        kwargs = {k: a.materialize() if isinstance(a, TracedLogits) else a for k, a in kwargs.items()}
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._form.logits(), name)


def _method(name: str) -> Any:
    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        return self._call(name, args, kwargs)

    return method


for _name in RECORDERS:
    setattr(TracedLogits, _name, _method(_name))
