"""Logits that are not computed: hidden states, a head, and the operations on their product.

Everything here is a function of tuples, so that torch.compile can trace it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.eager import autocasts
from ..losses.linear_cross_entropy import fused_linear_cross_entropy
from ..losses.log_probs import fused_linear_log_probs

#: ("cast", dtype), ("mul", number or 0-d tensor), ("div", the same), ("tanh", None), ("add", (V,) tensor) or
#: ("log_softmax", None).
Step = tuple[str, Any]


class Affine(NamedTuple):
    """Logits softcap * tanh(logit_scale * x / softcap) of x = hidden @ weight.T + bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class Product(NamedTuple):
    """Logits (..., V) = steps(hidden @ weight.T + bias); with `classes_second`, then moved to (N, V, ...)."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    linear_dtype: torch.dtype  # of the matrix product's result
    dtype: torch.dtype  # of the logits
    steps: tuple[Step, ...] = ()
    classes_second: bool = False
    #: "plain", for plain tensors. With a weight and bias that are DTensors sharded on V, the logits are "sharded" or
    #: "replicated" DTensors, or "gathered" into a plain tensor.
    layout: str = "plain"

    @property
    def shape(self) -> torch.Size:
        lead, V = list(self.hidden.shape[:-1]), self.weight.shape[0]
        return torch.Size([lead[0], V, *lead[1:]] if self.classes_second else [*lead, V])

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for products of the same tensors by the same operations."""
        operands = tuple(id(t) for t in (self.hidden, self.weight, self.bias))
        steps = tuple((kind, id(value) if isinstance(value, Tensor) else value) for kind, value in self.steps)
        return (*operands, self.linear_dtype, steps, self.layout)

    @property
    def rows(self) -> int:
        return self.hidden.shape[:-1].numel()

    @property
    def bytes(self) -> int:
        """The size of the logits, if they were computed."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the logits depend on."""
        values = [value for _, value in self.steps if isinstance(value, Tensor)]
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias]), *values]

    def with_tensors(self, tensors: list[Tensor]) -> Product:
        """The same product of other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        hidden, weight = next(rest), next(rest)
        bias = None if self.bias is None else next(rest)
        steps = tuple((kind, next(rest) if isinstance(value, Tensor) else value) for kind, value in self.steps)
        return self._replace(hidden=hidden, weight=weight, bias=bias, steps=steps)

    def step(self, kind: str, value: Any, dtype: torch.dtype | None = None) -> Product:
        return self._replace(steps=(*self.steps, (kind, value)), dtype=dtype or self.dtype)

    def cast(self, dtype: torch.dtype) -> Product | None:
        if dtype == self.dtype:
            return self
        if dtype == torch.float64 or not dtype.is_floating_point:  # the linear loss would be a float32 one
            return None
        return self.step("cast", dtype, dtype)

    def logits(self) -> Tensor:
        """The logits, computed by the recorded operations in their order."""
        operands = (self.hidden, self.weight, self.bias)
        with self._autocast(any(t is not None and t.dtype != self.linear_dtype for t in operands)):
            x = self._linear()
        x = self._stepped(x)
        return x.movedim(-1, 1) if self.classes_second else x

    def _stepped(self, x: Tensor) -> Tensor:
        for kind, value in self.steps:
            if kind == "cast":
                x = x.to(value)
            elif kind == "mul":
                x = x * value
            elif kind == "div":
                x = x / value
            elif kind == "tanh":
                x = x.tanh()
            elif kind == "log_softmax":
                x = x.log_softmax(-1)
            else:
                x = x + value
        return x

    def gradients(self, dlogits: Tensor, needs: list[bool]) -> list[Tensor | None] | None:
        """The gradients of `tensors`, given that of the logits; None for logits that are no plain matrix product."""
        if self.steps or self.classes_second or self.layout != "plain":
            return None
        dtype = self.linear_dtype
        dx, h = dlogits.reshape(-1, dlogits.shape[-1]).to(dtype), self.hidden
        gradients: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            gradients[0] = (dx @ self.weight.detach().to(dtype)).to(h.dtype).view(h.shape)
        if needs[1]:
            gradients[1] = (dx.t() @ h.detach().reshape(-1, h.shape[-1]).to(dtype)).to(self.weight.dtype)
        if self.bias is not None and needs[2]:
            gradients[2] = dx.sum(0).to(self.bias.dtype)
        return gradients

    def _linear(self) -> Tensor:
        if self.layout == "plain":
            return torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        from torch.distributed.tensor import DTensor, Replicate

        weight: Any = self.weight
        everywhere = [Replicate()] * weight.device_mesh.ndim
        hidden = DTensor.from_local(self.hidden, weight.device_mesh, everywhere, run_check=False)
        with torch._C.DisableTorchFunction():  # a hook may read it while the mode that deferred it is active
            x: Any = torch.nn.functional.linear(hidden, weight, self.bias)
        if self.layout != "sharded":
            x = x.redistribute(placements=everywhere)
        logits: Tensor = x.to_local() if self.layout == "gathered" else x
        return logits

    def _autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.hidden.device.type, dtype=self.linear_dtype if enabled else None, enabled=enabled)

    def affine(self) -> Affine | None:
        """The same logits up to rounding, in the form that the linear loss takes; None if they have no such form."""
        hidden, bias = self.hidden, self.bias
        scale, cap = 1.0, None
        for kind, value in self.steps:
            if kind == "cast":
                continue
            if kind == "log_softmax":
                return None
            if kind == "tanh":
                if cap is not None:
                    return None
                cap = 1.0
            elif kind == "add":
                if cap is not None or scale == 0.0 or (self.layout != "plain" and bias is not None):
                    return None
                unscaled = value if scale == 1.0 else value / scale
                bias = unscaled if bias is None else bias + unscaled
            elif isinstance(value, Tensor):
                if cap is not None:
                    return None
                factor = value if kind == "mul" else 1 / value
                hidden = hidden * factor.to(hidden.dtype)
                bias = None if bias is None else bias * factor.to(bias.dtype)
            else:
                number = value if kind == "mul" else 1 / value if value else math.nan
                scale *= number
                if cap is not None:
                    cap *= number
        if not math.isfinite(scale) or (cap is not None and not cap > 0):
            return None
        return Affine(hidden, self.weight, bias, scale, cap)

    def plus(self, other: Product) -> Product | None:
        """The sum of two products with the same rows, as one with the features of both (LoRA on a head)."""
        mine, others = self.affine(), other.affine()
        if self.shape != other.shape or self.classes_second or other.classes_second or mine is None or others is None:
            return None
        if mine.softcap is not None or others.softcap is not None or mine.logit_scale != 1.0:
            return None
        # The result has the dtype of the first product, which is the head's.
        hidden = torch.cat([mine.hidden, (others.hidden * others.logit_scale).to(mine.hidden.dtype)], -1)
        weight = torch.cat([mine.weight, others.weight.to(mine.weight.dtype)], -1)
        bias = None if others.bias is None else (others.bias * others.logit_scale).to(mine.weight.dtype)
        if mine.bias is not None:
            bias = mine.bias if bias is None else mine.bias + bias
        total = Product(hidden, weight, bias, self.linear_dtype, self.linear_dtype)
        return total.cast(torch.promote_types(self.dtype, other.dtype))

    @property
    def before_log_softmax(self) -> Product | None:
        """The logits whose log-probabilities these are; None if the last step is not log_softmax."""
        is_last = bool(self.steps) and self.steps[-1][0] == "log_softmax"
        return self._replace(steps=self.steps[:-1]) if is_last else None

    def cross_entropy(self, target: Tensor, options: dict[str, Any]) -> Any:
        """`fused_linear_cross_entropy` with its `options`, or None where it cannot express these logits.

        The result has the dtype that `F.cross_entropy` of the logits would have.
        """
        if self.ndim > 2 and not self.classes_second:
            return None
        is_probs = target.is_floating_point() and target.shape == self.shape
        dtype = torch.promote_types(self.dtype, target.dtype) if is_probs else self.dtype
        if autocasts(self.device):
            dtype = torch.float32
        dtype = options.get("loss_dtype") or dtype
        if is_probs and self.classes_second:
            target = target.movedim(1, -1)
        found = self._linear_loss(fused_linear_cross_entropy, target, options)
        if isinstance(found, tuple):
            return found[0].to(dtype), found[1]
        return None if found is None else found.to(dtype)

    def log_probs(self, target: Tensor, options: dict[str, Any]) -> Any:
        """`fused_linear_log_probs` of these logits, or None, as `cross_entropy`; (..., 1) as the target is."""
        found = self._linear_loss(fused_linear_log_probs, target.squeeze(-1), options)
        return None if found is None else found.unsqueeze(-1)

    def _linear_loss(self, function: Any, target: Tensor, options: dict[str, Any]) -> Any:
        affine = self.affine()
        if affine is None:
            return None
        hidden, weight, bias, scale, cap = affine
        if cap is not None and ("softcap" in options or "logit_scale" in options):
            return None
        options = {**options, "softcap": options.get("softcap", cap)}
        options["logit_scale"] = scale * options.get("logit_scale", 1.0)
        # Under autocast to the product's dtype, the loss is float32 until its caller casts it.
        half = self.linear_dtype in (torch.float16, torch.bfloat16)
        if bias is not None and not half:
            bias = bias.to(weight.dtype)
        with self._autocast(half):
            return function(hidden, weight, target, linear_bias=bias, **options)


def product_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return Product(hidden, weight, bias, dtype, dtype)
