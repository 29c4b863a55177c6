"""Deferred logits of a head whose vocabulary is sharded, as the hooks of tensor parallelism see them.

A head that is parallelised by columns multiplies DTensors. Its hooks then replicate the product on all ranks and
convert it to a plain tensor. Deferred logits only record these two steps, and the loss works on the shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.eager import is_tracing
from .forms import LAYOUT
from .logits import DeferredLogits, deferred_product
from .making import made
from .product import Product, product_of
from .recipe import Recipe
from .shared_state import SharedState


def is_sharded(hidden: Any, weight: Any, bias: Any) -> bool:
    """Whether these are a head sharded on its vocabulary over one dimension of a mesh, and hidden states for it."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or is_tracing():
        return False
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    if not all(type(t) in (module.DTensor, torch.nn.Parameter) and isinstance(t, module.DTensor) for t in tensors):
        return False
    sharded = [p for p in weight.placements if not isinstance(p, module.Replicate)]
    return (
        len(sharded) == 1
        and type(sharded[0]) is module.Shard
        and sharded[0].dim % weight.dim() == 0
        and weight.dim() == 2
        and hidden.device_mesh == weight.device_mesh
        and all(isinstance(p, module.Replicate) for p in hidden.placements)
        and hidden.is_floating_point()
    )


def defer_sharded(hidden: Any, weight: Any, bias: Any, shared: SharedState | None = None) -> DeferredLogits:
    """`F.linear` of DTensors, deferred. The shards stay, so that its losses need no call of the head."""
    product = product_of(hidden.to_local(), weight, bias)._replace(layout="sharded")
    logits: DeferredLogits = deferred_product(product, shared, None, DeferredDTensor)
    return logits


class DeferredDTensor(DeferredLogits):
    """Deferred logits that say they are a DTensor, until they are made local."""

    @property  # type: ignore[misc]  # a property, so that isinstance finds a DTensor
    def __class__(self) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor

    @property
    def device_mesh(self) -> Any:
        return self._form.product.weight.device_mesh

    @property
    def placements(self) -> tuple[Any, ...]:
        from torch.distributed.tensor import Replicate, Shard

        product = self._form.product
        last = Replicate() if product.layout == "replicated" else Shard(1 if product.classes_second else -1)
        return self._normalized(p if isinstance(p, Replicate) else last for p in product.weight.placements)

    def _normalized(self, placements: Iterable[Any]) -> tuple[Any, ...]:
        from torch.distributed.tensor import Shard

        return tuple(Shard(p.dim % self.dim()) if type(p) is Shard else p for p in placements)

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **kwargs: Any) -> Any:
        """Redistributes like a DTensor. Replicating all of the logits is recorded, but not done."""
        from torch.distributed.tensor import DTensor, Replicate

        given = (device_mesh, placements)
        if placements is not None and self._normalized(placements) == self.placements:
            return self
        is_product = isinstance(self._form, Product) and not self._form.classes_second and self._can_be_fused()
        if not is_product or placements is None or not all(isinstance(p, Replicate) for p in placements):
            return self._computed().redistribute(*given, **kwargs)
        return self._relaid(DTensor.redistribute, "replicated", given, kwargs, DeferredDTensor)

    def to_local(self, **kwargs: Any) -> Tensor:
        """The local tensor, as a DTensor gives it. For replicated logits it is deferred too."""
        from torch.distributed.tensor import DTensor

        if not self._can_be_fused() or not isinstance(self._form, Product) or self._form.layout != "replicated":
            local: Tensor = self._computed().to_local(**kwargs)
            return local
        gathered: Tensor = self._relaid(DTensor.to_local, "gathered", (), kwargs, DeferredLogits)
        return gathered

    def full_tensor(self, **kwargs: Any) -> Tensor:
        """The whole tensor, as a DTensor gives it, but deferred."""
        from torch.distributed.tensor import Replicate

        replicated = self.redistribute(placements=[Replicate()] * self.device_mesh.ndim)
        gathered: Tensor = replicated.to_local(**kwargs)
        return gathered

    def _relaid(self, func: Any, layout: str, args: Any, kwargs: dict[str, Any], cls: Any) -> Any:
        """The same logits in another layout over the ranks."""
        recipe = Recipe(func, f"{LAYOUT}{layout}", (self, *args), kwargs)
        return made(cls, recipe, self._form._replace(layout=layout), self._meta, self._device, self._shared)

    def _computed(self) -> Any:
        return self.materialize("redistribute")
