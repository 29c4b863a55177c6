"""Deferred logits while torch.compile traces, where tensor subclasses cannot be made."""

from __future__ import annotations

import contextlib
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..core.eager import traced_within_callers
from .expression import Form
from .forms import applied
from .loss import LOSSES
from .operations import ELEMENTWISE, MEMORY, NORMALIZING, RECORDED, writes
from .recipe import autocast_state
from .views import View

#: Methods that ask for the tensor's own place in autograd's graph, which only computed logits have.
_OF_GRAPH = frozenset({"register_hook", "retain_grad", "requires_grad_", "register_post_accumulate_grad_hook"})


class TracedLogits:
    """The counterpart of `DeferredLogits` while tracing: an ordinary object that has the methods of a tensor.

    Operations that are recorded give traced logits again; all others are done on the computed logits. If traced logits
    share memory, their computed values share memory, too. Once one of them has been written to, the computed values are
    used for all of them.
    """

    def __init__(self, form: Form, view: View | None = None, is_constant: bool = False) -> None:
        self._form, self._view = form, view
        self._is_constant = is_constant or not torch.is_grad_enabled()
        self._values: Tensor | None = None  # once somebody has written to them
        self._views: list[TracedLogits] = []
        if view is not None:
            view.base._views.append(self)

    def take_loss(self, lean: Any, dense: Any, operands: list[Tensor]) -> Any:
        """The loss of these logits; the graph that is traced has its gradients."""
        return dense(self.materialize(), *operands) if self._stands_alone() else lean(self._form, *operands)

    @property
    def classes(self) -> int:
        return self._form.product.weight.shape[0]

    def materialize(self, reader: str = "materialize") -> Tensor:
        if self._values is not None:
            return self._values
        # The mode in which a model's forward runs would defer the product again.
        with torch.set_grad_enabled(not self._is_constant), torch._C.DisableTorchFunction():
            if self._view is not None:
                return self._view.part_of(self._view.base.materialize())
            values = self._form.logits()
            return values.movedim(-1, 1) if self._form.classes_second else values

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """The counterpart of `DeferredLogits.saving`, with nothing to do: the compiler knows what its graph saves."""
        return contextlib.nullcontext()

    def _stands_alone(self, for_view: bool = False) -> bool:
        """Whether these logits are no longer what their form says: they were written to, or are a constant.

        A view of a constant is a constant, so its form may be used.
        """
        return self._values is not None or (self._is_constant and torch.is_grad_enabled() and not for_view)

    def _written(self) -> Tensor:
        """The values, for an operation that may write to them or change their place in the graph."""
        root = self
        while root._view is not None:
            root = root._view.base
        family = [root]
        for member in family:
            family += member._views
        for member in family:
            member._values = member.materialize()
        return self.materialize()

    def alone(self) -> TracedLogits:
        """These logits, without what is needed of them only while tracing."""
        self._view, self._views = None, []
        return self

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
        target = kwargs.get("out", args[0])
        if writes(name, kwargs) and isinstance(target, TracedLogits):
            target._written()
            func(*_values_of(args), **_values_of(kwargs))
            return target
        form = None
        is_view = not (name in ELEMENTWISE or name in NORMALIZING or name == "clone")
        if name in RECORDED and not any(isinstance(a, TracedLogits) and a._stands_alone(is_view) for a in args):
            # A tensor among the operands is copied, so that writing to it later does not change these logits.
            forms = [a._form if isinstance(a, TracedLogits) else _copied(a) for a in args]
            form = applied(func, name, forms, kwargs, autocast_state(self.device.type))
        if form is None:
            return func(*_values_of(args), **_values_of(kwargs))
        if not is_view:
            return TracedLogits(form)
        constant = name == "detach" or self._is_constant
        if isinstance(form, list):
            views = [View(self, func, args[1:], kwargs, i) for i in range(len(form))]
            return tuple([TracedLogits(part, view, constant) for part, view in zip(form, views, strict=True)])
        return TracedLogits(form, View(self, func, args[1:], kwargs), constant)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in LOSSES and isinstance(first, TracedLogits):
            return LOSSES[func](*args, **kwargs)
        if func is Tensor.matmul:
            return torch.matmul(*_in_order(*_values_of(args)))
        name = _name_of(func)
        if name in _AMBIGUOUS and isinstance(first, Tensor):
            torch._dynamo.graph_break()  # then Python itself calls the operator that was written
        logits = next((a for a in (*args, kwargs.get("out")) if isinstance(a, TracedLogits)), None)
        if logits is not None and (name or writes(name, kwargs)):
            return logits._call(func, name, args, kwargs)
        return func(*_values_of(args), **_values_of(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _OF_GRAPH:
            torch._dynamo.graph_break()  # Dynamo breaks the graph there anyway, but loses what the forward has counted
        stands_alone = writes(name, {}) or name in MEMORY or name in _OF_GRAPH
        return getattr(self._written() if stands_alone else self.materialize(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(self.unbind(0))


def _in_order(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of `@` in the order that their shapes fit in; Dynamo swaps them where the first is no tensor.

    It swaps those of other operators, too, but names the reverse operator.
    """
    return (x, y) if x.shape[-1] == y.shape[max(-2, -y.dim())] else (y, x)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _values_of(value: Any) -> Any:
    if isinstance(value, TracedLogits):
        return value.materialize()
    if type(value) in (tuple, list):
        return type(value)([_values_of(v) for v in value])
    if type(value) is dict:
        return {k: _values_of(v) for k, v in value.items()}
    return value


def _name_of(func: Any) -> str:
    """The name of a function that is recorded or writes, or ""; Dynamo knows the names of Python's functions only."""
    return _PYTHON_NAMES.get(func.__name__, "") if isinstance(func, FunctionType) else _NAMES.get(func, "")


def _method(name: str) -> Any:
    func = getattr(Tensor, name)

    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        return self._call(func, name, (self, *args), kwargs)

    return method


#: Operators of tensors, which Python looks for in the class, whether they are recorded or not.
_OPERATORS = [
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__matmul__", "__rmatmul__", "__mod__", "__rmod__"),
    *("__floordiv__", "__rfloordiv__", "__rpow__", "__abs__", "__invert__", "__and__", "__or__", "__xor__"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__setitem__"),
    *("__bool__", "__int__", "__float__", "__contains__"),
]
#: The names of the functions that are recorded and of those that write. Dynamo does not know the `__name__` of all.
_NAMES = {
    getattr(where, name): name
    for where in (Tensor, torch, torch.nn.functional)
    for name in dir(where)
    if (name in RECORDED or writes(name, {}) or name in _OPERATORS) and callable(getattr(where, name))
}
_PYTHON_NAMES = {func.__name__: name for func, name in _NAMES.items() if isinstance(func, FunctionType)}
#: Functions that Dynamo calls alike for `logits += tensor` and `logits + tensor`, and so for other operators. Which one
#: was written cannot be told.
_AMBIGUOUS = {"add", "mul", "__rsub__", "__rtruediv__", "__rfloordiv__", "__rmod__", "__rpow__"}
for _name in (*RECORDED, *_OPERATORS):
    if hasattr(Tensor, _name):
        setattr(TracedLogits, _name, _method(_name))
traced_within_callers(TracedLogits)
