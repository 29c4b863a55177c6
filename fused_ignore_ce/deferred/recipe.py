"""A recorded operation on deferred logits: how their values follow from those of its inputs, and their gradients.

A recipe is never changed. Its inputs are deferred logits or plain tensors. The product of hidden states and a head has
a recipe without deferred inputs, a root.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor

from .product import Product

#: Operations whose gradient does not depend on the values that they are given, only on shapes.
_LINEAR = frozenset({
    "float", "double", "half", "bfloat16", "to", "type_as", "contiguous", "clone", "view", "reshape", "flatten",
    "unsqueeze", "squeeze", "select", "narrow", "unbind", "split", "chunk", "permute", "transpose", "swapaxes",
    "swapdims", "movedim", "moveaxis", "index_select", "__getitem__", "neg", "negative", "__neg__", "add", "__add__",
    "__radd__", "sub", "subtract", "__sub__", "__rsub__", "rsub",
})  # fmt: skip

#: An operand of at most this many elements is copied, so that writing to it later does not change the logits.
_COPIED = 1 << 20

_CONSTANTS = (int, float, bool, str, slice, type(None), type(Ellipsis))

_serials = itertools.count(1)


def is_deferred(t: Any) -> bool:
    return hasattr(type(t), "_recipe")


def value_of(t: Any) -> Tensor:
    """The values of an input, without a graph."""
    value: Tensor = t._raw() if is_deferred(t) else t.detach()
    return value


class Edge:
    """A deferred input as a node of autograd's graph holds it.

    Its recipe is that of its own node, and gone once a backward has freed that node.
    """

    def __init__(self, t: Any) -> None:
        self._meta, self._in_graph = t._meta, t._in_graph
        self.shape, self.dtype, self.device = t.shape, t.dtype, t.device

    @property
    def _recipe(self) -> Recipe:
        recipe: Recipe | None = self._in_graph()
        if recipe is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time, after the first backward freed it: specify "
                "retain_graph=True"
            )
        return recipe

    def _is_known(self) -> bool:
        return False

    def _stands_alone(self) -> bool:
        return True

    def _raw(self, reader: str = "backward") -> Tensor:
        recipe = self._recipe
        value: Tensor = recipe.remake(recipe)._raw(reader)
        return value


def is_freed(t: Any) -> bool:
    """Whether a backward has freed the node of this input, which raises PyTorch's error if another one reaches it."""
    return isinstance(t, Edge) and t._in_graph() is None


def zeros_for(t: Any) -> Tensor:
    """A gradient for an input of a backward that is going to raise an error at another node.

    If a node raises it while others wait, autograd's queue holds those until the thread's next backward.
    """
    return torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)


def of_graph(t: Any, needed: bool) -> Any:
    """An input as the graph holds it."""
    with torch._C.DisableTorchFunctionSubclass():
        return Edge(t) if needed and is_deferred(t) and t._in_graph is not None else t


class Place(int):
    """Stands for the input of this number among the arguments of a recipe."""


class Recipe:
    """`func(*args, **kwargs)`, whose tensors are `inputs`; of a result of several tensors, the one at `part`.

    `needs` says of each input whether a gradient goes to it. `product` is the root's; its inputs are the product's
    tensors, and `head` is the module in whose call they were multiplied, if there was one.
    """

    def __init__(self, func: Any, name: str, args: Any, kwargs: Any, part: int | None = None) -> None:
        self.func, self.name, self.part = func, name, part
        self.serial = next(_serials)
        self.inputs: list[Any] = []
        self.args, self.kwargs = self._without_tensors(args), self._without_tensors(kwargs)
        self.product: Any = None  # or what torch.compile has recorded: an Expression
        self.head: Any = None
        with torch._C.DisableTorchFunctionSubclass():
            self.autocast = autocast_state(self.inputs[0].device.type)
            enabled = torch.is_grad_enabled()
            self.needs = [enabled and t.requires_grad for t in self.inputs]
        self.versions: list[Any] = []
        self.remake: Any = None  # makes the tensor anew, without a place in the graph

    @classmethod
    def root(cls, product: Any, head: Any) -> Recipe:
        recipe = cls.__new__(cls)
        recipe.func, recipe.name, recipe.args, recipe.kwargs, recipe.part = None, "product", (), {}, None
        recipe.serial = next(_serials)
        recipe.inputs, recipe.product, recipe.head, recipe.remake = product.tensors, product, head, None
        recipe.needs = [torch.is_grad_enabled() and t.requires_grad for t in recipe.inputs]
        recipe.versions = [version_of(t) for t in recipe.inputs]
        return recipe

    def _without_tensors(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.inputs.append(value)
            return Place(len(self.inputs) - 1)
        if type(value) in (tuple, list):
            return type(value)([v if type(v) in _CONSTANTS else self._without_tensors(v) for v in value])
        if type(value) is dict:
            return {k: self._without_tensors(v) for k, v in value.items()} if value else {}
        return value

    def keep_operands(self) -> None:
        """Replaces small plain inputs by copies, to which nobody writes, others by detached tensors of their memory.

        A write to that memory is noticed by its version. Called once the recipe has its place in autograd's graph.
        """
        for i, t in enumerate(self.inputs):
            if not is_deferred(t):
                with torch.no_grad():
                    self.inputs[i] = t.detach().clone() if t.numel() <= _COPIED else t.detach()
        self.versions = [0 if is_deferred(t) else version_of(t) for t in self.inputs]

    def of_graph(self) -> Recipe:
        """The recipe as a node of the graph holds it. It keeps nothing alive that a backward frees in other nodes."""
        if not any(needed and is_deferred(t) for t, needed in zip(self.inputs, self.needs, strict=True)):
            return self
        other = Recipe.__new__(Recipe)
        other.__dict__.update(self.__dict__)
        other.inputs = [of_graph(t, n) for t, n in zip(self.inputs, self.needs, strict=True)]
        return other

    @property
    def holders(self) -> list[Any]:
        """The inputs that a gradient goes to."""
        return [t for t, needed in zip(self.inputs, self.needs, strict=True) if needed]

    def check_unchanged(self) -> None:
        for t, version in zip(self.inputs, self.versions, strict=True):
            if not is_deferred(t):
                check_unchanged(t, version)

    def arguments(self, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _filled(self.args, values), _filled(self.kwargs, values)

    def run(self, values: list[Any]) -> Any:
        """The result for these values of the inputs, by the original operation."""
        if self.product is not None:
            return self.product.with_tensors(values).logits()
        args, kwargs = self.arguments(values)
        with autocast(self.autocast):
            out = self.func(*args, **kwargs)
        return out if self.part is None else out[self.part]

    def vjp(self, gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, given the result's."""
        if any(map(is_freed, self.inputs)):
            return [zeros_for(t) if needed else None for t, needed in zip(self.inputs, self.needs, strict=True)]
        if self.product is not None:
            self.check_unchanged()
            found = self.product.gradients(gradient, self.needs) if isinstance(self.product, Product) else None
            if found is not None:
                return list(found)
        scaled = self.name in _SCALES and sum(map(is_deferred, self.inputs)) == 1
        operands = [n for t, n in zip(self.inputs, self.needs, strict=True) if not is_deferred(t)]
        linear = self.name in _LINEAR or (scaled and not any(operands))
        values = []
        for t, needed in zip(self.inputs, self.needs, strict=True):
            if linear and is_deferred(t):
                value = torch.empty_strided(
                    t._meta.shape, t._meta.stride(), dtype=t._meta.dtype, device=gradient.device
                )
            else:
                value = value_of(t).detach()
            values.append(value.requires_grad_(needed))
        with torch.enable_grad():
            out = self.run(values)
        wanted = [v for v, n in zip(values, self.needs, strict=True) if n]
        found_ = iter(torch.autograd.grad(out, wanted, gradient, allow_unused=True, materialize_grads=True))
        return [next(found_) if n else None for n in self.needs]


_SCALES = ("mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__")


def _filled(value: Any, values: list[Any]) -> Any:
    if type(value) is Place:
        return values[value]
    if type(value) in (tuple, list):
        return type(value)([_filled(v, values) for v in value])
    if type(value) is dict:
        return {k: _filled(v, values) for k, v in value.items()}
    return value


def autocast_state(device: str) -> tuple[str, torch.dtype | None]:
    """Autocast's dtype on a type of device; None if it is off."""
    on = torch.is_autocast_enabled(device)
    return device, torch.get_autocast_dtype(device) if on else None


def autocast(state: Any) -> Any:
    """A context with this state of autocast."""
    device, dtype = state
    if autocast_state(device) == state:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def check_unchanged(t: Tensor, version: Any) -> None:
    """Raises an error if a tensor that logits depend on has changed."""
    if version_of(t) != version:
        raise RuntimeError(
            "logits: the head's weights or the hidden states were changed in place or resized since the forward, so "
            "its logits cannot be computed any more; before optimizer.step(), read outputs.logits or keep "
            "outputs.logits.detach().clone(), or patch with keep_logits=True, which computes logits that are still "
            "held when an optimizer steps"
        )
    if t.numel() and _has_memory(t) and t.untyped_storage().size() == 0:
        raise RuntimeError(
            "logits: the head's weights were freed before the loss was taken or the logits were read, as a sharding "
            "wrapper does after a forward, and a call of the head does not bring them back. FSDP2: after the forward, "
            "it needs fully_shard(model, reshard_after_forward=False) for the head's group, or a group of its own for "
            "the head. FSDP1: wrap the head by itself and call defer_logits on the wrapper, or leave the head to the "
            "wrapper around the model. Or call unpatch_model(model)"
        )


def _has_memory(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.device.type != "meta"


def version_of(t: Tensor) -> tuple[int, torch.Size]:
    """What changes when a tensor does: it is written to, or gets another `data`, as resized embeddings do."""
    return 0 if t.is_inference() else t._version, t.shape
