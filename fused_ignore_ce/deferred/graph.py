"""Deferred logits in autograd's graph: the gradient that is not computed, and the nodes that hand it on.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recipe import Recipe, is_deferred, value_of

_MODULUS = (1 << 61) - 1


def refuse_create_graph() -> None:
    """Raises an error in a backward whose gradients cannot be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True is not supported by deferred logits: take the loss of outputs.logits.materialize(), or "
            "call unpatch_model(model)"
        )


def total(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _number(serial: int, place: int) -> int:
    """The factor of the edge from a recipe to an input, pseudo-random and never 0."""
    return 1 + hash((serial * 0x9E3779B97F4A7C15 + place * 0xBF58476D1CE4E5B9) % _MODULUS) % (_MODULUS - 1)


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
        self.numbers = [_number(-1 - i, i) for i in range(len(inputs))]
        self.expected: dict[int, int] = {}
        recipes: dict[int, Recipe] = {}
        for t, needed, number in zip(inputs, needs, self.numbers, strict=True):
            if needed:
                self._add(t._recipe, number, recipes)
        while recipes:  # from the newest: a recipe's inputs are older than itself
            recipe = recipes.pop(max(recipes))
            arrived = self.expected[recipe.serial]
            for i, (t, needed) in enumerate(zip(recipe.inputs, recipe.needs, strict=True)):
                if needed and is_deferred(t):
                    self._add(t._recipe, arrived * _number(recipe.serial, i) % _MODULUS, recipes)

    def _settle(self) -> None:
        for reference in self.made:
            if (gradient := reference()) is not None:
                gradient.dense()

    def _add(self, recipe: Recipe, number: int, recipes: dict[int, Recipe]) -> None:
        recipes[recipe.serial] = recipe
        self.expected[recipe.serial] = (self.expected.get(recipe.serial, 0) + number) % _MODULUS


class Flow(NamedTuple):
    """What has arrived of a loss's gradient: the number of its paths, and functions whose results' sum it is."""

    number: int
    values: tuple[Callable[[], Tensor], ...]

    def plus(self, other: Flow) -> Flow:
        return Flow((self.number + other.number) % _MODULUS, self.values + other.values)


class Gradient(Tensor):
    """A gradient that is computed when it is read: what flows from losses, and a dense tensor `extra` beside it.

    Autograd adds Gradients of one recipe without computing them. Any other operation computes the values.
    """

    _recipe_of: Recipe
    _flows: dict[Ticket, Flow]
    _extra: Tensor | None
    _values: Tensor | None
    _version_computed: int

    @staticmethod
    def of(like: Any, recipe: Recipe, flows: dict[Ticket, Flow], extra: Tensor | None) -> Gradient:
        made: Any = Tensor._make_wrapper_subclass(Gradient, like.shape, dtype=like.dtype, device=like.device)
        made._recipe_of, made._flows, made._extra, made._values = recipe, flows, extra, None
        for ticket in flows:
            ticket.made.append(weakref.ref(made))
        result: Gradient = made
        return result

    def dense(self) -> Tensor:
        """The values, as a plain tensor."""
        if self._values is None:
            with _above_autograd(), torch.no_grad():
                found = self._extra
                for flow in self._flows.values():
                    for value in flow.values:
                        found = total(found, value())
                assert found is not None
                self._values = found if found is not self._extra else found.clone()
            self._version_computed = self._values._version
        return self._values

    @property
    def is_changed(self) -> bool:
        return self._values is not None and self._values._version != self._version_computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in ("__get__", "__set__") or func.__self__.__name__ in ("data", "T", "mT", "H", "mH"):
            args, kwargs = _dense_of((args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # static there
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs:
            a, b = args if isinstance(args[0], Gradient) else args[::-1]
            if not a.is_changed and (
                not isinstance(b, Gradient) or (b._recipe_of is a._recipe_of and not b.is_changed)
            ):
                return a._plus(b)
        args, kwargs = _dense_of((args, kwargs or {}))
        return func(*args, **kwargs)

    def _plus(self, other: Tensor) -> Gradient:
        flows, extra = self._flows, other
        if isinstance(other, Gradient):
            flows, extra = dict(flows), other._extra
            for ticket, flow in other._flows.items():
                flows[ticket] = flows[ticket].plus(flow) if ticket in flows else flow
        return Gradient.of(self, self._recipe_of, flows, total(self._extra, extra))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # has no annotations there
        return repr(self.dense())


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


class _Token(Tensor):
    """Holds an object for backward. Saved as a tensor is, so that autograd frees it when it frees tensors."""

    held: Any

    @staticmethod
    def of(held: Any) -> Any:
        token: Any = Tensor._make_wrapper_subclass(_Token, (0,))
        token.held = held
        return token

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # static there
        return _Token.of(args[0].held)  # detach, which autograd asks for where hooks pack what is saved


def are_saved_tensors_packed() -> bool:
    """Whether somebody, such as a checkpoint, packs the tensors that are saved for backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def unpacked() -> Any:
    """A context in which tensors are saved as they are: a checkpoint has nothing to compute again for our nodes."""
    if not are_saved_tensors_packed():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def connected(function: Any, *args: Any) -> Any:
    """Applies an autograd.Function of this package."""
    with torch._C.DisableTorchFunctionSubclass(), unpacked():
        return function.apply(*args)


class Node(torch.autograd.Function):
    """A recorded operation; makes its result."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, make: Callable[[], Any], *inputs: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_Token.of(recipe))
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        nothing = (None,) * (len(ctx.needs_input_grad) - 2)
        if gradient is None:
            return None, None, *nothing
        refuse_create_graph()
        recipe: Recipe = ctx.saved_tensors[0].held
        with torch._C.DisableTorchFunctionSubclass():
            return None, None, *_handed_down(recipe, gradient)


def _handed_down(recipe: Recipe, gradient: Any) -> list[Any]:
    """The gradients of a recipe's inputs, given that of its result."""

    def vjp(g: Tensor) -> list[Tensor | None]:
        return recipe.vjp(g)

    if not isinstance(gradient, Gradient) or gradient._recipe_of is not recipe or gradient.is_changed:
        return vjp(dense_of(gradient) if isinstance(gradient, Gradient) else value_of(gradient))
    extra, whole = gradient._extra, {}
    for ticket, flow in gradient._flows.items():
        if flow.number == ticket.expected.get(recipe.serial):
            whole[ticket] = flow
        else:
            for value in flow.values:
                extra = total(extra, value())
    rest = [None] * len(recipe.inputs) if extra is None else vjp(extra)
    if not whole:
        return rest
    found: list[Any] = []
    for i, (t, needed) in enumerate(zip(recipe.inputs, recipe.needs, strict=True)):
        if not needed:
            found.append(None)
        elif is_deferred(t):
            factor = _number(recipe.serial, i)
            flows = {
                ticket: Flow(flow.number * factor % _MODULUS, (_lazily(vjp, flow, i),))
                for ticket, flow in whole.items()
            }
            found.append(Gradient.of(t, t._recipe, flows, rest[i]))
        else:
            part = rest[i]
            for ticket in whole:
                part = total(part, ticket.parts.get((recipe.serial, i)))
            found.append(torch.zeros_like(t) if part is None else part)
    return found


def _lazily(vjp: Callable[[Tensor], Any], flow: Flow, place: int) -> Callable[[], Tensor]:
    def value() -> Tensor:
        given = None
        for part in flow.values:
            given = total(given, part())
        found: Tensor = vjp(given)[place]  # type: ignore[arg-type]  # there is at least one value
        return found

    return value


class Work(NamedTuple):
    """A loss that was computed without logits, as its node keeps it."""

    results: list[Tensor]  # with a graph that ends in the leaves
    leaves: dict[tuple[int, int], Tensor]  # detached plain inputs of recipes
    operands: list[Tensor]  # detached tensors that the loss was given beside logits
    inputs: list[Any]  # the deferred logits
    needs: list[bool]  # of inputs and operands
    dense: Callable[..., Any]  # the results, from computed logits and operands

    def gradients(self, upstream: tuple[Any, ...]) -> list[Any]:
        """The gradients of the deferred inputs, and of the operands."""
        pairs = [(r, g) for r, g in zip(self.results, upstream, strict=True) if g is not None and r.requires_grad]
        if not pairs:
            return [None] * len(self.needs)
        wanted = [*self.leaves.values(), *(t for t in self.operands if t.requires_grad)]
        results, given = zip(*pairs, strict=True)
        found = list(torch.autograd.grad(results, wanted, given, retain_graph=True, allow_unused=True))
        parts = dict(zip(self.leaves, found, strict=False))
        of_operands = iter(found[len(self.leaves) :])
        ticket = Ticket(parts, self.inputs, self.needs[: len(self.inputs)])
        memo: list[Any] = []

        def value(i: int) -> Callable[[], Tensor]:
            def dense() -> Tensor:
                if not memo:
                    memo.extend(self._dense_gradients(upstream))
                gradient: Tensor = memo[i]
                return gradient

            return dense

        out: list[Any] = []
        for i, (t, needed) in enumerate(zip([*self.inputs, *self.operands], self.needs, strict=True)):
            if not needed:
                out.append(None)
            elif is_deferred(t):
                out.append(Gradient.of(t, t._recipe, {ticket: Flow(ticket.numbers[i], (value(i),))}, None))
            else:
                out.append(next(of_operands))
        return out

    def _dense_gradients(self, upstream: tuple[Any, ...]) -> list[Tensor | None]:
        needs = self.needs[: len(self.inputs)]
        values = [value_of(t).detach().requires_grad_(n) for t, n in zip(self.inputs, needs, strict=True)]
        with torch.enable_grad():
            results, _ = torch.utils._pytree.tree_flatten(self.dense(*values, *(t.detach() for t in self.operands)))
        pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if g is not None and r.requires_grad]
        wanted = [v for v, n in zip(values, needs, strict=True) if n]
        differentiated, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(differentiated, wanted, given, allow_unused=True, materialize_grads=True))
        return [next(found) if n else None for n in needs]


class Fused(torch.autograd.Function):
    """The results of a loss that was computed without logits."""

    @staticmethod
    def forward(ctx: Any, work: Work, *inputs: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_Token.of(work))
        results = tuple(r.detach() for r in work.results)
        pairs = zip(results, work.results, strict=True)
        ctx.mark_non_differentiable(*(mine for mine, r in pairs if not r.requires_grad))
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        refuse_create_graph()
        work: Work = ctx.saved_tensors[0].held
        with torch._C.DisableTorchFunctionSubclass():
            return None, *work.gradients(upstream)


class Read(torch.autograd.Function):
    """The computed logits; their gradient goes to the deferred tensor."""

    @staticmethod
    def forward(ctx: Any, deferred: Any, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class Adopt(torch.autograd.Function):
    """Gives a deferred tensor the place in the graph of the computed tensor that stands for it."""

    @staticmethod
    def forward(ctx: Any, deferred: Any, value: Tensor) -> Any:
        ctx.mark_dirty(deferred)
        return deferred

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return None, gradient
