"""Makes deferred logits, and finds them among the arguments of a call."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from .graph import Node, connected
from .recipe import Recipe
from .shared_state import SharedState
from .values import Lazy


def deferred_in(values: Any) -> list[Lazy]:
    """The deferred logits among arguments."""
    found: list[Lazy] = []
    for value in values:
        if isinstance(value, Lazy):
            found.append(value)
        elif type(value) in (tuple, list):
            found += deferred_in(value)
        elif type(value) is dict and value:
            found += deferred_in(value.values())
    return found


def made(
    cls: Any, recipe: Recipe, form: Any, meta: Tensor, device: torch.device, shared: SharedState, node: bool = True
) -> Lazy:
    """Makes deferred logits, with a node in autograd's graph if one of the recipe's inputs needs a gradient."""

    def make(recipe: Recipe) -> Any:
        made = wrapped(cls, meta, device, shared)
        made._recipe, made._form = recipe, form
        return made

    if not node:
        alias: Lazy = make(recipe)
        return alias
    inputs, recipe.remake = list(recipe.inputs), make
    if recipe.product is None:
        recipe.keep_operands()
    if not any(recipe.needs):
        constant: Lazy = make(recipe)
        return constant
    of_graph = recipe.of_graph()
    make_result = functools.partial(make, recipe)
    deferred: Lazy = connected(Node, of_graph, make_result, *inputs, holders=of_graph.holders)
    deferred._in_graph = weakref.ref(of_graph)
    return deferred


def wrapped(cls: Any, meta: Tensor, device: torch.device, shared: SharedState) -> Any:
    made: Any = Tensor._make_wrapper_subclass(
        cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=device
    )
    made._meta, made._device, made._shared, made._views, made._saved = meta, device, shared, [], []
    return made
