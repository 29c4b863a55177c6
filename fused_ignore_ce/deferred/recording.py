"""The operations that deferred logits record, by their names in PyTorch.

Between a head and its loss, transformers' models cast, scale, cap, add biases, pick rows, reshape, and cut off a
padded vocabulary. Operations on rows are applied to the hidden states at once, slices of the vocabulary to weight and
bias; the others become steps. A recorder returns None for arguments that it cannot record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.eager import autocasts
from .product import Product

#: name -> recorder(product, *args, **kwargs): a Product, a list of them, or None.
RECORDERS: dict[str, Callable[..., Any]] = {}

#: Operations that are recorded with the logits as their second operand, too.
COMMUTATIVE = ("add", "__add__", "mul", "multiply", "__mul__")


def record(product: Product, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The product after an operation; a list if the operation returns several tensors; None if it is not recorded."""
    if name not in RECORDERS or (product.classes_second and name not in _WITH_CLASSES_SECOND):
        return None
    return RECORDERS[name](product, *args, **kwargs)


_WITH_CLASSES_SECOND = (
    "float", "double", "half", "bfloat16", "to", "type_as", "contiguous", "clone", "detach", "log_softmax", "tanh",
    "mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__",
)  # fmt: skip


def _records(*names: str) -> Callable[[Any], Any]:
    def register(recorder: Any) -> Any:
        RECORDERS.update(dict.fromkeys(names, recorder))
        return recorder

    return register


@_records("float")
def _float(p: Product, **layout: Any) -> Product | None:
    return None if layout else p.cast(torch.float32)


@_records("double")
def _double(p: Product, **layout: Any) -> Product | None:
    return None if layout else p.cast(torch.float64)


@_records("half")
def _half(p: Product, **layout: Any) -> Product | None:
    return None if layout else p.cast(torch.float16)


@_records("bfloat16")
def _bfloat16(p: Product, **layout: Any) -> Product | None:
    return None if layout else p.cast(torch.bfloat16)


@_records("to", "type_as")
def _to(p: Product, *args: Any, **kwargs: Any) -> Product | None:
    dtype, device = p.dtype, p.hidden.device
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif isinstance(value, (torch.device, str)):
            device = torch.device(value)
        elif value is not None and not isinstance(value, bool):
            return None
    here = device.type == p.hidden.device.type and device.index in (None, p.hidden.device.index)
    return p.cast(dtype) if here else None


@_records("contiguous", "clone")
def _same(p: Product, **layout: Any) -> Product | None:
    return None if layout else p


@_records("detach")
def _detach(p: Product) -> Product:
    return p.with_tensors([t.detach() for t in p.tensors])


@_records("tanh")
def _tanh(p: Product) -> Product:
    return p.step("tanh", None)


@_records("log_softmax")
def _log_softmax(
    p: Product, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Product | None:
    if dim is None or dim % p.ndim != (1 if p.classes_second else p.ndim - 1):
        return None
    if _stacklevel is not None and isinstance(_stacklevel, torch.dtype):  # Tensor.log_softmax(dim, dtype)
        dtype = _stacklevel
    if dtype is None and autocasts(p.hidden.device) and p.hidden.device.type != "cpu":
        dtype = torch.float32  # as autocast does on devices other than CPUs
    upcast = p if dtype is None else p.cast(dtype)
    return None if upcast is None else upcast.step("log_softmax", None)


@_records("mul", "multiply", "__mul__", "__rmul__")
def _mul(p: Product, value: Any, **out: Any) -> Product | None:
    return None if out else _scale(p, "mul", value)


@_records("div", "divide", "true_divide", "__truediv__")
def _div(p: Product, value: Any, **rounding: Any) -> Product | None:
    return None if rounding else _scale(p, "div", value)


def _scale(p: Product, kind: str, value: Any) -> Product | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return p.step(kind, value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1 or value.dim() > p.ndim:
        return None
    if value.dim() > 0 and value.dtype != p.dtype:  # it would promote
        return None
    return p.step(kind, value.reshape(()))


@_records("add", "__add__", "__radd__")
def _add(p: Product, value: Any, **alpha: Any) -> Product | None:
    """Adds a vector over the vocabulary."""
    V = p.weight.shape[0]
    if alpha or not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() > p.ndim:
        return None
    if value.numel() != V or value.shape[-1:] != (V,):
        return None
    return p.step("add", value.reshape(V), torch.promote_types(p.dtype, value.dtype))


@_records("sub", "subtract", "__sub__")
def _sub(p: Product, value: Any, **alpha: Any) -> Product | None:
    return _add(p, -value, **alpha) if isinstance(value, Tensor) else None


@_records("__getitem__")
def _getitem(p: Product, index: Any) -> Product | None:
    """Applies an index that leaves the vocabulary whole, or slices it."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (list, bool)) for item in items):
        return None
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    consumed = sum(_consumed(item) for item in items)
    if consumed > p.ndim:
        return None
    if items[-1] is Ellipsis:
        if consumed < p.ndim:
            return p._replace(hidden=p.hidden[tuple(items)])
        items.pop()  # the Ellipsis covers no dimension: the last item is the vocabulary's
    if not isinstance(items[-1], slice):
        return None
    classes, items[-1] = items[-1], slice(None)
    return _slice_classes(p._replace(hidden=p.hidden[tuple(items)]), classes)


def _consumed(item: Any) -> int:
    """How many dimensions an item of an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _slice_classes(p: Product, classes: slice) -> Product | None:
    if classes == slice(None):
        return p
    if any(kind == "log_softmax" for kind, _ in p.steps):  # log_softmax was over all classes
        return None
    return p._replace(
        weight=p.weight[classes],
        bias=None if p.bias is None else p.bias[classes],
        steps=tuple((kind, value[classes] if kind == "add" else value) for kind, value in p.steps),
    )


@_records("view", "reshape")
def _reshape(p: Product, *sizes: Any, **kwargs: Any) -> Product | None:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if kwargs or not sizes or any(isinstance(size, torch.dtype) for size in sizes):
        return None
    lead, last, V = list(sizes[:-1]), sizes[-1], p.weight.shape[0]
    if last == -1:
        last = math.prod(p.shape) // max(1, math.prod(lead))
    if last != V or V == 0:
        return None
    return p._replace(hidden=p.hidden.reshape(*lead, p.hidden.shape[-1]))


@_records("permute")
def _permute(p: Product, *dims: Any, **kwargs: Any) -> Product | None:
    order = list(dims[0]) if dims and isinstance(dims[0], (tuple, list)) else list(dims)
    return None if kwargs or len(order) != p.ndim else _reorder(p, [d % p.ndim for d in order])


@_records("transpose", "swapaxes", "swapdims")
def _transpose(p: Product, *dims: int, **kwargs: Any) -> Product | None:
    a, b = (d % p.ndim for d in (dims or tuple(kwargs.values())))
    order = list(range(p.ndim))
    order[a], order[b] = b, a
    return _reorder(p, order)


@_records("movedim", "moveaxis")
def _movedim(p: Product, source: Any, destination: Any) -> Product | None:
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    order = list(range(p.ndim))
    order.insert(destination % p.ndim, order.pop(source % p.ndim))
    return _reorder(p, order)


def _reorder(p: Product, order: list[int]) -> Product | None:
    """Reorders the rows. Classes stay last, or come second, where `F.cross_entropy` wants them."""
    last = p.ndim - 1
    at = order.index(last)
    if at not in (1, last):
        return None
    order.remove(last)
    return p._replace(hidden=p.hidden.permute(*order, last), classes_second=at != last)


@_records("flatten")
def _flatten(p: Product, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _on_rows(p, "flatten", start_dim, end_dim)


@_records("unsqueeze")
def _unsqueeze(p: Product, dim: int) -> Product | None:
    dim = dim if dim >= 0 else dim + p.ndim + 1
    return None if dim == p.ndim else p._replace(hidden=p.hidden.unsqueeze(dim))


@_records("squeeze")
def _squeeze(p: Product, dim: Any = None) -> Any:
    return _on_rows(p, "squeeze", dim)


@_records("select")
def _select(p: Product, dim: int, index: int) -> Any:
    return _on_rows(p, "select", dim, rest=(index,))


@_records("index_select")
def _index_select(p: Product, dim: int, index: Tensor) -> Any:
    return _on_rows(p, "index_select", dim, rest=(index,))


@_records("narrow")
def _narrow(p: Product, dim: int, start: Any, length: int) -> Any:
    if dim % p.ndim == p.ndim - 1 and isinstance(start, int):
        start = start if start >= 0 else start + p.weight.shape[0]
        return _slice_classes(p, slice(start, start + length))
    return _on_rows(p, "narrow", dim, rest=(start, length))


@_records("unbind")
def _unbind(p: Product, dim: int = 0) -> Any:
    return _on_rows(p, "unbind", dim)


@_records("split")
def _split(p: Product, split_size: Any, dim: int = 0) -> Any:
    return _on_rows(p, "split", dim, first=(split_size,))


@_records("chunk")
def _chunk(p: Product, chunks: int, dim: int = 0) -> Any:
    return _on_rows(p, "chunk", dim, first=(chunks,))


def _on_rows(p: Product, name: str, *dims: Any, first: tuple[Any, ...] = (), rest: tuple[Any, ...] = ()) -> Any:
    """Applies a method to the hidden states, unless one of the dimensions is the vocabulary's."""
    if any(not isinstance(d, int) or d % p.ndim == p.ndim - 1 for d in dims):
        return None
    hidden = getattr(p.hidden, name)(*first, *(d % p.ndim for d in dims), *rest)
    if isinstance(hidden, Tensor):
        return p._replace(hidden=hidden)
    return [p._replace(hidden=part) for part in hidden]
