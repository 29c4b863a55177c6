"""What a loss computes deferred logits from: a `Product` or an `Expression`, which follows from their recipes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import expression
from .product import Product
from .recipe import Recipe, is_deferred
from .recording import COMMUTATIVE, record


def applied(recipe: Recipe, values: list[Any]) -> Any:
    """The form after a recorded operation on forms and tensors; a list of all results of one that returns several.

    None if no form can express it.
    """
    args, kwargs = recipe.arguments(values)
    name, first = recipe.name, args[0]
    if name == "detach":
        return first
    if name.startswith("layout "):
        return first._replace(layout=name.removeprefix("layout "))
    if name in COMMUTATIVE and len(args) == 2 and not isinstance(first, (Product, expression.Expression)):
        first, args = args[1], (args[1], args[0])
    done: Any = None
    if isinstance(first, Product):
        if name in ("add", "__add__") and len(args) == 2 and isinstance(args[1], Product):
            done = None if kwargs or _has_added(first) or _has_added(args[1]) else first.plus(args[1])
        elif not any(isinstance(a, (Product, expression.Expression)) for a in args[1:]):
            done = record(first, name, args[1:], kwargs)
    elif isinstance(first, expression.Expression):
        done = expression.on_rows(first, name, args[1:], kwargs)
    if done is None:
        args, kwargs = recipe.arguments(values)
        done = expression.record(recipe.func, name, args, kwargs, recipe.autocast)
    return done


def _has_added(product: Product) -> bool:
    return any(kind == "add" for kind, _ in product.steps)


class Leaves:
    """The forms of deferred logits, made of new leaves of autograd's graph."""

    def __init__(self) -> None:
        #: Detached plain inputs of recipes that need a gradient, by the recipe's serial and the input's place.
        self.found: dict[tuple[int, int], Tensor] = {}
        self._forms: dict[tuple[int, bool], Any] = {}

    def form(self, t: Any, needed: bool) -> Any:
        """The form of a deferred tensor, None if there is none; a constant if it needs no gradient."""
        recipe: Recipe = t._recipe
        key = (recipe.serial, needed)
        if key not in self._forms:
            recipe.check_unchanged()
            values: list[Any] = []
            for i, (x, need) in enumerate(zip(recipe.inputs, recipe.needs, strict=True)):
                if is_deferred(x):
                    values.append(self.form(x, needed and need))
                else:
                    values.append(x.detach())
                    if needed and need:
                        self.found[recipe.serial, i] = values[-1].requires_grad_()
            self._forms[key] = self._made(recipe, values)
        return self._forms[key]

    def _made(self, recipe: Recipe, values: list[Any]) -> Any:
        if recipe.product is not None:
            return recipe.product.with_tensors(values)
        if any(v is None for v in values):
            return None
        done = applied(recipe, values)
        return done if recipe.part is None or done is None else done[recipe.part]
