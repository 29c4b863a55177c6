"""Calls of a head's module that compute something else than its logits.

A wrapper that gathers the head's weights for each call of the module, as FSDP and DeepSpeed do, gathers them for such a
call, too.
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


def with_weights(recipe: Recipe, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns. If the head's weights are not there, it is called in a call of the head."""
    found: Tensor = _with_weights(recipe, compute)[0]
    return found


def in_call_of_head(recipe: Recipe, compute: Callable[[], Any]) -> Any:
    """As `with_weights`, but the result has passed the head's hooks, which bring the weights back for backward."""
    computed, found = _with_weights(recipe, compute)
    flat = torch.utils._pytree.tree_leaves
    if found is not computed and not all(map(_is_same, flat(found), flat(computed))):
        raise RuntimeError(
            "head: expected forward hooks that leave a loss as it is, got one that changed it; the loss was taken in a "
            "call of the head because the head's weights are freed after each call. Do in the model's forward what the "
            "hook does, or call unpatch_model(model)"
        )
    return found


def _with_weights(recipe: Recipe, compute: Callable[[], Any]) -> tuple[Any, Any]:
    """What `compute` returns, and what hooks on the head make of that."""
    root = root_of(recipe)
    if root.head is not None and not all(map(_is_there, root.inputs)):
        inside = InHead(compute)
        found = root.head(root.inputs[0], inside)
        if inside.was_called:  # hooks may pass the hidden states on, and no more
            return inside.computed, found
    computed = compute()
    return computed, computed


def root_of(recipe: Recipe) -> Recipe:
    while recipe.product is None:
        recipe = next(t for t in recipe.inputs if is_deferred(t))._recipe
    return recipe


def _is_same(found: Any, computed: Any) -> bool:
    return found is computed or (
        isinstance(found, Tensor)
        and found.shape == computed.shape
        and torch.allclose(found.detach(), computed.detach(), rtol=0, atol=0, equal_nan=True)
    )


def _is_there(t: Tensor) -> bool:
    """Whether a tensor has its memory: DeepSpeed replaces a parameter's by none, FSDP frees it.

    FSDP1 multiplies with a part of its flat parameter.
    """
    if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type == "meta":
        return True
    if t.numel() == 0:
        return type(t) is Tensor
    return t.untyped_storage().size() > 0
