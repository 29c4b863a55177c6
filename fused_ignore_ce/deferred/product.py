"""`Product`: hidden states, a head's weight and bias, and the logits that are their product.

Functions of named tuples, here and in the other files of forms, can be traced by torch.compile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.eager import is_tracing


class Product(NamedTuple):
    """Logits (..., V) = hidden @ weight.T + bias."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    dtype: torch.dtype  # of the matrix product and its result
    #: Whether the tensor of logits has the classes second, (N, V, ...), where `F.cross_entropy` wants them.
    classes_second: bool = False
    #: "plain", for plain tensors. With a weight and bias that are DTensors sharded on V, the logits are "sharded" or
    #: "replicated" DTensors, or "gathered" into a plain tensor.
    layout: str = "plain"

    @property
    def product(self) -> Product:
        return self

    @property
    def shape(self) -> torch.Size:
        lead, V = list(self.hidden.shape[:-1]), self.weight.shape[0]
        return torch.Size([lead[0], V, *lead[1:]] if self.classes_second else [*lead, V])

    @property
    def rows(self) -> int:
        return self.hidden.shape[:-1].numel()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the logits depend on."""
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    def with_tensors(self, tensors: list[Tensor]) -> Product:
        """The same product of other tensors, in the order of `tensors`."""
        hidden, weight, *bias = tensors
        return self._replace(hidden=hidden, weight=weight, bias=bias[0] if bias else None)

    def logits(self) -> Tensor:
        """The product, with the classes last."""
        with self.autocast(any(t.dtype != self.dtype for t in self.tensors)):
            return self._linear()

    def gradients(self, dlogits: Tensor, needs: list[bool]) -> list[Tensor | None] | None:
        """The gradients of `tensors`, given that of the logits; None for a sharded head."""
        if self.layout != "plain":
            return None
        dtype = self.dtype
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
            if is_tracing():  # `F.linear` in the compiled graph would be deferred by the mode that the forward runs in
                product: Tensor = torch.ops.aten.linear.default(self.hidden, self.weight, self.bias)
                return product
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

    def autocast(self, enabled: bool) -> torch.autocast:
        """A context with autocast to the product's dtype, or without autocast."""
        return torch.autocast(self.hidden.device.type, dtype=self.dtype if enabled else None, enabled=enabled)


def product_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    """The product that `F.linear` of these tensors computes here, under autocast or not."""
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return Product(hidden, weight, bias, dtype)
