"""The form of deferred logits, a `Product` or an `Expression`: losses are computed from it. Recipes say what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .expression import Expression, elementwise, is_form, normalized
from .operations import CASTS, ELEMENTWISE, NORMALIZING, ON_ROWS, SAME
from .recipe import Recipe, is_deferred
from .rows import on_rows

#: How the name of a change of the layout of sharded logits begins.
LAYOUT = "layout "


def applied(func: Any, name: str, args: Any, kwargs: dict[str, Any], autocast: Any, dtype: Any = None) -> Any:
    """The form after an operation on forms and tensors; a list of forms if it gives several tensors.

    None if the operation is not recorded for these arguments. `dtype` is that of the result, None to find it out.
    """
    if name in ELEMENTWISE:
        return elementwise(func, name, args, kwargs, autocast, dtype)
    form, *rest = args
    if not is_form(form):
        return None
    if name in SAME:
        return form
    if name in ON_ROWS:
        return on_rows(func, name, args, kwargs)
    if name in NORMALIZING:
        return normalized(func, name, args, kwargs, autocast, dtype)
    if name in CASTS:
        found = cast_of(name, rest, kwargs, form)
        if found is None:
            return None
        return Expression(Tensor.to, "to", (form, found[0]), {}, found[0], form.product, autocast)
    return form._replace(layout=name.removeprefix(LAYOUT))


def cast_of(name: str, args: Any, kwargs: dict[str, Any], form: Any) -> tuple[torch.dtype, bool] | None:
    """The dtype of a cast, and whether a copy is asked for; None for other devices, layouts and kinds of numbers."""
    dtype, device = CASTS[name] or form.dtype, form.product.hidden.device
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
    if not dtype.is_floating_point:
        return None
    flags = [value for value in args if isinstance(value, bool)]  # non_blocking, copy
    return dtype, any(flags[1:]) or bool(kwargs.get("copy"))


class Leaves:
    """The forms of deferred logits, made of new leaves of autograd's graph."""

    def __init__(self) -> None:
        #: Detached plain inputs of recipes that need a gradient, by the recipe's serial and the input's place.
        self.found: dict[tuple[int, int], Tensor] = {}
        #: The parameters of heads, each with the detached tensor that stands for it here.
        self.parameters: list[tuple[Tensor, Tensor]] = []
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
                    # What a backward may save is no tensor of inference mode.
                    values.append(x.clone() if x.is_inference() and torch.is_grad_enabled() else x.detach())
                    if type(x) is torch.nn.Parameter:
                        self.parameters.append((x, values[-1]))
                    if needed and need:
                        self.found[recipe.serial, i] = values[-1].requires_grad_()
            self._forms[key] = self._made(recipe, values, t._meta.dtype)
        return self._forms[key]

    def _made(self, recipe: Recipe, values: list[Any], dtype: torch.dtype) -> Any:
        if recipe.product is not None:
            return recipe.product.with_tensors(values)
        if any(v is None for v in values):
            return None
        args, kwargs = recipe.arguments(values)
        done = applied(recipe.func, recipe.name, args, kwargs, recipe.autocast, dtype)
        return done if recipe.part is None or done is None else done[recipe.part]
