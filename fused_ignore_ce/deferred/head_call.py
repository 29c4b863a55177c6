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
    """What `compute` returns. If the weights of its logits' head are not there, it is called in a call of the head."""
    found: Tensor = _inside(_without_weights(recipe), compute)[0]
    return found


def in_call_of_head(recipe: Recipe, compute: Callable[[], Any]) -> Any:
    """As `with_weights`, but the result has passed the head's hooks, which bring the weights back for backward.

    Logits of several models have several heads, whose calls are made one inside another.
    """
    return _unchanged(*_inside(_without_weights(recipe), compute))


def _inside(roots: list[Recipe], compute: Callable[[], Any]) -> tuple[Any, Any]:
    """What `compute` returns in calls of the roots' heads, and what hooks on the outermost of them make of that."""
    if roots:
        inside = InHead(lambda: _unchanged(*_inside(roots[1:], compute)))
        found = roots[0].head(roots[0].inputs[0], inside)
        if inside.was_called:  # hooks may pass the hidden states on, and no more
            return inside.computed, found
        return _inside(roots[1:], compute)
    computed = compute()
    return computed, computed


def _unchanged(computed: Any, found: Any) -> Any:
    """What hooks have made of a result; an error if they changed its value."""
    flat = torch.utils._pytree.tree_leaves
    if found is not computed and not all(map(_is_same, flat(found), flat(computed))):
        raise RuntimeError(
            "head: expected forward hooks that leave a loss as it is, got one that changed it; the loss was taken in a "
            "call of the head because the head's weights are freed after each call. Do in the model's forward what the "
            "hook does, or call unpatch_model(model)"
        )
    return found


def _without_weights(recipe: Recipe) -> list[Recipe]:
    """The roots of a recipe whose heads' weights are not there; one for each head."""
    found: dict[int, Recipe] = {}
    seen, recipes = {recipe.serial}, [recipe]
    for each in recipes:
        if each.product is not None and each.head is not None and not all(map(_is_there, each.inputs)):
            found.setdefault(id(each.head), each)
        above = [t._recipe for t in each.inputs if is_deferred(t)]
        recipes += [r for r in {r.serial: r for r in above}.values() if r.serial not in seen]
        seen.update(r.serial for r in above)
    return list(found.values())


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
