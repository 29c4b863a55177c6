"""Calls of a head's module that compute something else than its logits.

Whoever gathers the head's weights around calls of the module has them there in such a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .recipe import Recipe, is_deferred


class InHead:
    """What a head computes in place of its logits, when it is called with this as its second argument."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute
        self.was_called = False
        self.computed: Any = None

    def __call__(self) -> Any:
        self.was_called = True
        self.computed = self._compute()
        return self.computed


def in_call_of_head(recipe: Recipe, compute: Callable[[], Any]) -> Any:
    """What `compute` returns, and what hooks on the head make of that."""
    root = root_of(recipe)
    if root.head is None:
        return compute()
    inside = InHead(compute)
    found = root.head(root.inputs[0], inside)
    # Hooks of tensor parallelism pass the hidden states on, and no more.
    return found if inside.was_called else compute()


def with_weights(recipe: Recipe, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns. If the head's weights are not there, it is called where they are."""
    root = root_of(recipe)
    if root.head is None or all(map(_is_there, root.inputs)):
        return compute()
    inside = InHead(compute)
    root.head(root.inputs[0], inside)
    found: Tensor = inside.computed if inside.was_called else compute()
    return found


def root_of(recipe: Recipe) -> Recipe:
    while recipe.product is None:
        recipe = next(t for t in recipe.inputs if is_deferred(t))._recipe
    return recipe


def _is_there(t: Tensor) -> bool:
    """Whether a tensor has its memory: DeepSpeed replaces a parameter's by none, FSDP frees it."""
    if type(t) is not torch.nn.Parameter or t.device.type == "meta":
        return True
    return t.numel() > 0 and t.untyped_storage().size() > 0
