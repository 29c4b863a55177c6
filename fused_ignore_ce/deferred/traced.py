"""Deferred logits while torch.compile traces, where tensor subclasses cannot be made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .expression import Form
from .forms import applied
from .loss import LOSSES
from .operations import RECORDED
from .recipe import autocast_state


class TracedLogits:
    """The counterpart of `DeferredLogits` while tracing: an ordinary object that has the methods that are recorded."""

    def __init__(self, form: Form) -> None:
        self._form = form

    def take_loss(self, lean: Any, dense: Any, operands: list[Tensor]) -> Any:
        """The loss of these logits; the graph that is traced has its gradients."""
        return lean(self._form, *operands)

    @property
    def classes(self) -> int:
        return self._form.product.weight.shape[0]

    def materialize(self, reader: str = "materialize") -> Tensor:
        values = self._form.logits()
        return values.movedim(-1, 1) if self._form.classes_second else values

    @property
    def shape(self) -> torch.Size:
        return self._form.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._form.dtype

    @property
    def device(self) -> torch.device:
        return self._form.product.hidden.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def is_contiguous(self) -> bool:
        return not self._form.classes_second

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def _call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on tensors and these logits, one of its arguments."""
        forms = [a._form if isinstance(a, TracedLogits) else a for a in args]
        form = applied(func, name, forms, kwargs, autocast_state(self.device.type))
        if form is None:
            values = [a.materialize() if isinstance(a, TracedLogits) else a for a in args]
            kwargs = {k: a.materialize() if isinstance(a, TracedLogits) else a for k, a in kwargs.items()}
            return func(*values, **kwargs)
        if isinstance(form, list):
            return tuple([TracedLogits(part) for part in form])
        return TracedLogits(form)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOSSES and args and isinstance(args[0], TracedLogits):
            return LOSSES[func](*args, **kwargs)
        logits = next((a for a in args if isinstance(a, TracedLogits)), None)
        if logits is not None and func.__name__ in RECORDED:
            return logits._call(func, func.__name__, args, kwargs)
        args = tuple(a.materialize() if isinstance(a, TracedLogits) else a for a in args)
        kwargs = {k: a.materialize() if isinstance(a, TracedLogits) else a for k, a in kwargs.items()}
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)


def _method(name: str) -> Any:
    func = getattr(Tensor, name)

    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        return self._call(func, name, (self, *args), kwargs)

    return method


for _name in RECORDED:
    if hasattr(Tensor, _name):
        setattr(TracedLogits, _name, _method(_name))
