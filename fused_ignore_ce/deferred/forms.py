"""What a loss computes deferred logits from: their form, a `Product` or an `Expression`, which follows from recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .expression import Expression, elementwise, is_form, normalized
from .operations import CASTS, ELEMENTWISE, NORMALIZING, SAME
from .recipe import Recipe, is_deferred
from .rows import ON_ROWS, on_rows

#: The closed list of operations that are recorded.
RECORDED = ELEMENTWISE | NORMALIZING | CASTS.keys() | SAME | ON_ROWS
#: How the name of a change of the layout of sharded logits begins.
LAYOUT = "layout "


def applied(func: Any, name: str, args: Any, kwargs: dict[str, Any], autocast: Any) -> Any:
    """The form after an operation on forms and tensors; a list of forms if it gives several tensors.

    None if the operation is not recorded for these arguments.
    """
    if name in ELEMENTWISE:
        return elementwise(func, name, args, kwargs, autocast)
    form, *rest = args
    if not is_form(form):
        return None
    if name in SAME:
        return form
    if name in ON_ROWS:
        return on_rows(form, name, rest, kwargs)
    if name in NORMALIZING:
        return normalized(func, name, args, kwargs, autocast)
    if name in CASTS:
        cast = cast_of(name, rest, kwargs, form.product.hidden.device)
        if cast is None or cast[0] is None:
            return None if cast is None else form
        return Expression(Tensor.to, "to", (form, cast[0]), {}, autocast)
    return form._replace(layout=name.removeprefix(LAYOUT))


def cast_of(name: str, args: Any, kwargs: dict[str, Any], device: torch.device) -> tuple[Any, bool] | None:
    """The dtype of a cast, None to keep it, and whether a copy is asked for; None for other devices and layouts."""
    dtype = CASTS[name]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (Tensor, torch.device, str)):
            to = value.device if isinstance(value, Tensor) else torch.device(value)
            if to.type != device.type or to.index not in (None, device.index):
                return None
            dtype = value.dtype if isinstance(value, Tensor) else dtype
        elif value is not None and not isinstance(value, bool):
            return None
    if dtype is not None and not dtype.is_floating_point:
        return None
    flags = [value for value in args if isinstance(value, bool)]  # non_blocking, copy
    return dtype, any(flags[1:]) or bool(kwargs.get("copy"))


def result_dtype(name: str, args: Any, kwargs: dict[str, Any], form: Any, logits: Any) -> torch.dtype:
    """The dtype of an operation's result, given its form; `logits` is the first deferred argument.

    For arithmetic, the operation tells it for tensors without elements, under autocast as it is here.
    """
    if name in CASTS:
        return form.args[1] if isinstance(form, Expression) else logits.dtype
    if name in NORMALIZING:
        args, kwargs = (logits, -1), form.kwargs
    elif name not in ELEMENTWISE:
        return logits.dtype
    dtype: torch.dtype = form.func(*[_without_elements(a) for a in args], **kwargs).dtype
    return dtype


def _without_elements(value: Any) -> Any:
    if hasattr(value, "_form"):
        return torch.empty(0, dtype=value.dtype, device=value.device)
    return value.new_empty(0) if isinstance(value, Tensor) and value.dim() else value


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
        args, kwargs = recipe.arguments(values)
        done = applied(recipe.func, recipe.name, args, kwargs, recipe.autocast)
        return done if recipe.part is None or done is None else done[recipe.part]
