"""`LossMode`: while it is active, the head's product is deferred, and this package computes every cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.eager import is_tracing, refuse_transforms, traced_within_callers
from ..losses.causal_lm import fused_causal_lm_loss
from .expression import log_softmax_of
from .logits import defer
from .loss import LOSSES
from .product import product_of
from .sharded import defer_sharded, is_sharded
from .shared_state import SharedState
from .traced import TracedLogits
from .values import Lazy

_MATMULS = ("matmul", "__matmul__")


@traced_within_callers
class LossMode(TorchFunctionMode):
    """Defers the product with a head of `classes` rows; with `classes=None`, there is no head, and nothing is deferred.

    The options of the settings are added to the cross entropies over that many classes, or over any number
    without a head. It is entered and left by one function: around the call of a head that is no plain linear layer,
    around a forward that calls no head that defers by itself, and where torch.compile traces.
    """

    def __init__(
        self, classes: int | None, shared: SharedState, head: Any = None, weights: Any = None, ndim: int | None = None
    ) -> None:
        """`weights` and `ndim` limit what is deferred, where a forward multiplies other tensors, too.

        `weights` are those with which `F.linear` is deferred, if a model inside has others. `ndim` is the number of
        dimensions of hidden states: DoRA multiplies its head with a unit matrix besides.
        """
        super().__init__()
        self.weights, self.ndim = weights, ndim
        self.classes = classes
        self.shared = shared
        self.head = head

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return self._linear(func, *args, **kwargs)
        if func in LOSSES and (
            func is not torch.nn.functional.nll_loss or _are_log_probs(args[0] if args else kwargs["input"])
        ):
            return self._loss(func, *args, **kwargs)
        if self.classes is not None and getattr(func, "__name__", "") in _MATMULS and not kwargs:
            return self._matmul(func, *args)
        return func(*args, **kwargs)

    def _linear(self, func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
        others = self.weights is not None and all(weight is not known for known in self.weights)
        others = others or self.ndim not in (None, input.dim())
        if self.classes is None or weight.shape[0] != self.classes or others or self._is_for_one_layer(weight):
            return func(input, weight, bias)
        if is_sharded(input, weight, bias):
            return defer_sharded(input, weight, bias, self.shared)
        if not can_defer(input, weight, bias):
            return func(input, weight, bias)
        return self._deferred(input, weight, bias)

    def _is_for_one_layer(self, weight: Any) -> bool:
        """Whether DeepSpeed gathers this weight for calls of a layer inside the head, and not for those of the head."""
        own = getattr(self.head, "_parameters", {}).values()
        return hasattr(weight, "ds_id") and all(weight is not each for each in own)

    def _matmul(self, func: Any, input: Any, other: Any) -> Any:
        """Recognises an embedding that is used as a projection: h @ embedding.weight.T."""
        if other.dim() != 2 or other.shape[1] != self.classes or not can_defer(input, other, None):
            return func(input, other)
        return self._deferred(input, other.t(), None)

    def _deferred(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if is_tracing():
            self.shared.deferred = True
            return TracedLogits(product_of(hidden, weight, bias))
        self.shared.head_deferred = self.shared.head_deferred or self.head is not None
        return defer(hidden, weight, bias, self.shared, self.head)

    def _loss(self, func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Lazy):
            return _loss_of_deferred(func, input, *args, shared=self.shared, **kwargs)
        classes = input.shape[-1 if func is fused_causal_lm_loss else input.dim() > 1]
        if not hasattr(input, "take_loss") and self.classes is not None and classes != self.classes:
            return func(input, *args, **kwargs)
        return LOSSES[func](input, *args, shared=self.shared, **kwargs)


@torch.compiler.disable
def _loss_of_deferred(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A loss of deferred logits, which Dynamo would trace where a graph broke in a compiled model's forward."""
    return LOSSES[func](*args, **kwargs)


def can_defer(hidden: Any, weight: Any, bias: Any) -> bool:
    """Whether the product of these can be deferred; an error in transforms of `torch.func` and in forward mode."""
    plain = (Tensor, torch.nn.Parameter)
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    can = (
        all(type(t) in plain and t.device == hidden.device and t.is_floating_point() for t in tensors)
        and hidden.dim() > 0
        and weight.dim() == 2
        and hidden.device.type != "meta"
    )
    if can:
        refuse_transforms(*tensors)
    return can


def _are_log_probs(input: Any) -> bool:
    return log_softmax_of(getattr(input, "_form", None)) is not None
