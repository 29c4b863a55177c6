"""The gradient of deferred logits, which is not computed until it is read.

A loss of deferred logits knows the gradients of hidden states and head. What it sends down the graph is a `Gradient`:
the gradient of the logits, computed if somebody reads it. The node of the product, which it reaches in the end, returns
the finished gradients of hidden states and head instead of computing them from it.

Hooks, retained gradients and code between the nodes may replace a Gradient by a tensor, or a part of it may be read.
So a node has to know whether all of a loss's gradient arrived. Each path from the loss to a node has a number, and a
Gradient carries the sum of the numbers of its paths. If they do not add up to what the loss expects at this node, what
arrived is computed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .recipe import Recipe, is_deferred, is_freed, zeros_for

MODULUS = (1 << 61) - 1


def total(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def number_of(serial: int, place: int) -> int:
    """The factor of the edge from a recipe to an input, pseudo-random and never 0."""
    return 1 + hash((serial * 0x9E3779B97F4A7C15 + place * 0xBF58476D1CE4E5B9) % MODULUS) % (MODULUS - 1)


class Ticket:
    """One backward of one loss.

    `parts` are the gradients of plain inputs, by the serial of the recipe and the input's place. `expected` is the
    number that has to arrive at a recipe, by its serial.
    """

    def __init__(self, parts: dict[tuple[int, int], Tensor | None], inputs: list[Any], needs: list[bool]) -> None:
        self.parts = parts
        #: The Gradients of this loss. Those that somebody still holds once backward is over are computed then, because
        #: weights may change afterwards.
        self.made: list[weakref.ref[Gradient]] = []
        torch.autograd.Variable._execution_engine.queue_callback(self._settle)
        self.numbers = [number_of(-1 - i, i) for i in range(len(inputs))]
        self.expected: dict[int, int] = {}
        #: The recipes, which Gradients may ask for after backward has freed their nodes.
        self.recipes: dict[int, Recipe] = {}
        recipes: dict[int, Recipe] = {}
        for t, needed, number in zip(inputs, needs, self.numbers, strict=True):
            if needed and not is_freed(t):
                self._add(t._recipe, number, recipes)
        while recipes:  # from the newest: a recipe's inputs are older than itself
            recipe = recipes.pop(max(recipes))
            arrived = self.expected[recipe.serial]
            for i, (t, needed) in enumerate(zip(recipe.inputs, recipe.needs, strict=True)):
                if needed and is_deferred(t) and not is_freed(t):
                    self._add(t._recipe, arrived * number_of(recipe.serial, i) % MODULUS, recipes)

    def _settle(self) -> None:
        for reference in self.made:
            if (gradient := reference()) is not None:
                gradient.settle()

    def _add(self, recipe: Recipe, number: int, recipes: dict[int, Recipe]) -> None:
        recipes[recipe.serial] = self.recipes[recipe.serial] = recipe
        self.expected[recipe.serial] = (self.expected.get(recipe.serial, 0) + number) % MODULUS


class Flow(NamedTuple):
    """What has arrived of a loss's gradient: the number of its paths, and functions whose results' sum it is."""

    number: int
    values: tuple[Callable[[], Tensor], ...]

    def plus(self, other: Flow) -> Flow:
        return Flow((self.number + other.number) % MODULUS, self.values + other.values)


class Gradient(Tensor):
    """A gradient that is computed when it is read: what flows from losses, and a dense tensor `extra` beside it.

    Autograd adds Gradients of one recipe without computing them. Any other operation computes the values.
    """

    _recipe_of: Recipe
    _flows: dict[Ticket, Flow]
    _extra: Tensor | None
    _computed: Tensor | None
    _version_computed: int

    @staticmethod
    def of(like: Any, recipe: Recipe, flows: dict[Ticket, Flow], extra: Tensor | None) -> Gradient:
        made: Any = Tensor._make_wrapper_subclass(Gradient, like.shape, dtype=like.dtype, device=like.device)
        made._recipe_of, made._flows, made._extra, made._computed = recipe, flows, extra, None
        for ticket in flows:
            ticket.made.append(weakref.ref(made))
        result: Gradient = made
        return result

    def dense(self) -> Tensor:
        """The values, as a plain tensor."""
        if self._computed is None:
            with _above_autograd(), torch.no_grad():
                extra: Any = self._extra
                found = extra
                for flow in self._flows.values():
                    for value in flow.values:
                        found = total(found, value())
                assert found is not None
                self._computed = found.clone() if found is extra else found
            self._version_computed = self._computed._version
        return self._computed

    def settle(self) -> None:
        """Computes the values, and lets go of what they come from: logits, if this is kept as their `.grad`."""
        self._extra, self._flows = self.dense(), {}

    @property
    def is_changed(self) -> bool:
        return self._computed is not None and self._computed._version != self._version_computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in ("__get__", "__set__") or func.__self__.__name__ in ("data", "T", "mT", "H", "mH"):
            args, kwargs = _dense_of((args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # a static method in PyTorch's stubs
        if func is torch.ops.aten.add.Tensor and not kwargs:
            a, b = args if isinstance(args[0], Gradient) else args[::-1]
            if not a.is_changed and (
                not isinstance(b, Gradient) or (b._recipe_of.serial == a._recipe_of.serial and not b.is_changed)
            ):
                return a._plus(b)
        args, kwargs = _dense_of((args, kwargs or {}))
        return func(*args, **kwargs)

    def _plus(self, other: Tensor) -> Gradient:
        flows, extra = self._flows, cast(Tensor | None, other)
        if isinstance(other, Gradient):
            flows, extra = dict(flows), other._extra
            for ticket, flow in other._flows.items():
                flows[ticket] = flows[ticket].plus(flow) if ticket in flows else flow
        return Gradient.of(self, self._recipe_of, flows, total(self._extra, extra))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # Tensor's own has no annotations
        return repr(self.dense())


def handed_to(t: Any, flows: dict[Ticket, Flow], extra: Tensor | None) -> Tensor:
    """The gradient that goes to the node of a deferred input; zeros to a node that will raise."""
    if is_freed(t):
        return zeros_for(t)
    return Gradient.of(t, t._recipe, flows, extra)


def dense_of(gradient: Any) -> Any:
    return gradient.dense() if isinstance(gradient, Gradient) else gradient


def _dense_of(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Gradient, Gradient.dense, values)


@contextlib.contextmanager
def _above_autograd() -> Iterator[None]:
    """Lets a computation inside of __torch_dispatch__, where autograd is switched off, be differentiated."""
    with contextlib.ExitStack() as stack:
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        yield
