"""The nodes of deferred logits in autograd's graph: they hand gradients on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.batches import is_batched, loops_over_batches
from .gradient import MODULUS, Flow, Gradient, Ticket, dense_of, handed_to, number_of, total
from .recipe import Recipe, is_deferred, value_of


class _Token(Tensor):
    """Holds an object for backward. Saved as a tensor is, so that autograd frees it when it frees tensors."""

    held: Any

    @staticmethod
    def of(held: Any) -> Any:
        token: Any = Tensor._make_wrapper_subclass(_Token, (0,))
        token.held = held
        return token

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # a static method in PyTorch's stubs
        return _Token.of(args[0].held)  # detach, which autograd asks for where hooks pack what is saved


def are_saved_tensors_packed() -> bool:
    """Whether somebody, such as a checkpoint, packs the tensors that are saved for backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def connected(function: Any, *args: Any, holders: Iterable[Any] = ()) -> Any:
    """Applies an autograd.Function of this package.

    For each tensor that the function saves, a holder is kept in its place, from which its value follows. A backward
    with `create_graph=True` gets the value, with the tensor's place in the graph; any other backward gets an empty
    tensor.
    """
    rest = iter(holders)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t if type(t) is _Token else next(rest), _unpack)
    with torch._C.DisableTorchFunctionSubclass(), hooks:
        return function.apply(*args)


def _unpack(holder: Any) -> Tensor:
    if type(holder) is _Token:
        return holder
    return value_of(holder) if torch.is_grad_enabled() else torch.empty(0)


def _needed(values: Iterable[Any], needs: list[bool]) -> list[Any]:
    return [value for value, needed in zip(values, needs, strict=True) if needed]


def _with_graph(saved: Any, holders: list[Any], needs: list[bool]) -> list[Tensor]:
    """The values of a node's inputs, those that need a gradient as new tensors that the saved ones go to."""
    rest = iter(saved)
    return [(t := next(rest)).view_as(t) if n else value_of(holder) for holder, n in zip(holders, needs, strict=True)]


def _differentiated(results: Any, inputs: list[Tensor], upstream: Any, needs: list[bool]) -> list[Tensor | None]:
    """The gradients of inputs, which can be differentiated again."""
    wanted = _needed(inputs, needs)
    pairs = [(r, g) for r, g in zip(results, upstream, strict=True) if g is not None and r.requires_grad]
    if not pairs:
        return [None] * len(needs)
    differentiated, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(differentiated, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs]


class Node(torch.autograd.Function):
    """A recorded operation; makes its result."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, make: Callable[[], Any], *inputs: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_Token.of(recipe), *_needed(inputs, recipe.needs))
        return make()

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, gradient: Any) -> Any:
        nothing = (None,) * (len(ctx.needs_input_grad) - 2)
        if gradient is None:
            return None, None, *nothing
        token, *saved = ctx.saved_tensors
        recipe: Recipe = token.held
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_grad_enabled():
                recipe.check_unchanged()
                values = _with_graph(saved, recipe.inputs, recipe.needs)
                return None, None, *_differentiated([recipe.run(values)], values, [dense_of(gradient)], recipe.needs)
            return None, None, *_handed_down(recipe, gradient)


def _handed_down(recipe: Recipe, gradient: Any) -> list[Any]:
    """The gradients of a recipe's inputs, given that of its result."""

    def vjp(g: Tensor) -> list[Tensor | None]:
        return recipe.vjp(g)

    if not isinstance(gradient, Gradient) or gradient._recipe_of.serial != recipe.serial or gradient.is_changed:
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
            factor = number_of(recipe.serial, i)
            flows = {
                ticket: Flow(flow.number * factor % MODULUS, (_lazily(vjp, flow, i),)) for ticket, flow in whole.items()
            }
            found.append(handed_to(t, flows, rest[i]))
        else:
            part = rest[i]
            for ticket in whole:
                part = total(part, ticket.parts.pop((recipe.serial, i), None))
            found.append(torch.zeros_like(t) if part is None else part)
    return found


def _lazily(vjp: Callable[[Tensor], Any], flow: Flow, place: int) -> Callable[[], Tensor]:
    def value() -> Tensor:
        given = None
        for part in flow.values:
            given = total(given, part())
        found: Tensor = vjp(given)[place]  # type: ignore[arg-type]  # not None: a flow has at least one value
        return found

    return value


def _apart(gradients: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients no two of which share memory, as those of two biases that were added do.

    Autograd may keep a gradient as a leaf's `.grad`, and add the next one to it in place.
    """
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for g in gradients:
        address = g.untyped_storage().data_ptr() if type(g) is Tensor else None
        found.append(g.clone() if g is not None and address and address in seen else g)
        seen.add(address or 0)
    return found


class Work(NamedTuple):
    """A loss that was computed without logits, as its node keeps it."""

    results: list[Tensor]  # with a graph that ends in the leaves
    leaves: dict[tuple[int, int], Tensor]  # detached plain inputs of recipes
    operands: list[Tensor]  # detached tensors that the loss was given beside logits
    inputs: list[Any]  # the deferred logits
    needs: list[bool]  # of inputs and operands
    dense: Callable[..., Any]  # the results, from computed logits and operands

    @property
    def holders(self) -> list[Any]:
        """The inputs and operands that a gradient goes to."""
        return _needed([*self.inputs, *self.operands], self.needs)

    def gradients(self, upstream: tuple[Any, ...]) -> list[Any]:
        """The gradients of the deferred inputs, and of the operands."""
        pairs = [(r, g) for r, g in zip(self.results, upstream, strict=True) if g is not None and r.requires_grad]
        if not pairs:
            return [None] * len(self.needs)
        wanted = [*self.leaves.values(), *(t for t in self.operands if t.requires_grad)]
        results, given = zip(*pairs, strict=True)
        # Where the graph is not kept, gradients that a loss has computed in its forward are scaled in place.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        found = _apart(torch.autograd.grad(results, wanted, given, retain_graph=keep, allow_unused=True))
        parts: dict[tuple[int, int], Tensor | None] = dict(zip(self.leaves, found, strict=False))
        of_operands = iter(found[len(self.leaves) :])
        ticket = Ticket(parts, self.inputs, self.needs[: len(self.inputs)])
        memo: list[Any] = []
        of_inputs = [n and i < len(self.inputs) for i, n in enumerate(self.needs)]

        def value(i: int) -> Callable[[], Tensor]:
            def dense() -> Tensor:
                if not memo:
                    memo.extend(self.dense_gradients(upstream, of_inputs))
                gradient: Tensor = memo[i]
                return gradient

            return dense

        out: list[Any] = []
        for i, (t, needed) in enumerate(zip([*self.inputs, *self.operands], self.needs, strict=True)):
            if not needed:
                out.append(None)
            elif is_deferred(t):
                out.append(handed_to(t, {ticket: Flow(ticket.numbers[i], (value(i),))}, None))
            else:
                out.append(next(of_operands))
        return out

    def dense_gradients(self, upstream: tuple[Any, ...], needs: list[bool]) -> list[Tensor | None]:
        """The gradients of those inputs and operands that `needs` says, from computed logits."""
        tensors = [*self.inputs, *self.operands]
        values = [value_of(t).detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        with torch.enable_grad():
            results, _ = torch.utils._pytree.tree_flatten(self.dense(*values))
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
        ctx.save_for_backward(_Token.of(work), *_needed(inputs, work.needs))
        results = tuple(r.detach() for r in work.results)
        pairs = zip(results, work.results, strict=True)
        ctx.mark_non_differentiable(*(mine for mine, r in pairs if not r.requires_grad))
        return results

    @staticmethod
    @loops_over_batches
    def backward(ctx: Any, *upstream: Any) -> Any:
        token, *saved = ctx.saved_tensors
        work: Work = token.held
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_grad_enabled():
                values = _with_graph(saved, [*work.inputs, *work.operands], work.needs)
                results, _ = torch.utils._pytree.tree_flatten(work.dense(*values))
                return None, *_differentiated(results, values, upstream, work.needs)
            if is_batched(ctx):  # what comes back is stacked, as no `Gradient` can be
                return None, *work.dense_gradients(upstream, work.needs)
            return None, *work.gradients(upstream)


class Read(torch.autograd.Function):
    """The computed logits; their gradient goes to the deferred tensor."""

    @staticmethod
    def forward(ctx: Any, deferred: Any, compute: Callable[[], Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return compute()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class Nowhere(torch.autograd.Function):
    """A view that was written to after its base was detached in place: PyTorch drops its gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None


class Adopt(torch.autograd.Function):
    """Gives a deferred tensor the place in the graph of the computed tensor that stands for it."""

    @staticmethod
    def forward(ctx: Any, deferred: Any, value: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(deferred)
        return deferred

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return None, gradient
