"""The autograd nodes of deferred logits, and the check that the tensors they depend on are unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_create_graph() -> None:
    """Raises an error in a backward whose gradients cannot be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True is not supported by deferred logits: take the loss of outputs.logits.materialize(), or "
            "call unpatch_model(model)"
        )


class Node(torch.autograd.Function):
    """Makes deferred logits a part of the autograd graph. Its backward computes the logits."""

    @staticmethod
    def forward(ctx: Any, product: Any, cls: Any, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.product = product.with_tensors([t.detach() for t in tensors])
        return torch.Tensor._make_wrapper_subclass(cls, product.shape, dtype=product.dtype, device=product.device)

    @staticmethod
    def backward(ctx: Any, dlogits: Any) -> Any:
        if dlogits is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_create_graph()
        needed = ctx.needs_input_grad[2:]
        tensors = [t.detach().requires_grad_(n) for t, n in zip(ctx.product.tensors, needed, strict=True)]
        with torch.enable_grad():
            logits = ctx.product.with_tensors(tensors).logits()
        grads = iter(torch.autograd.grad(logits, [t for t in tensors if t.requires_grad], dlogits, allow_unused=True))
        return None, None, *(next(grads) if n else None for n in needed)


class Read(torch.autograd.Function):
    """The logits of a tensor that another autograd.Function returned; their gradient goes to that function."""

    @staticmethod
    def forward(ctx: Any, deferred: Any) -> Tensor:
        logits: Tensor = deferred._checked_product().logits()
        return logits

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        return dlogits


class Connect(torch.autograd.Function):
    """Identity; its backward also reaches the logits, without a gradient, so that their hooks are called.

    The hooks get None. FSDP's hooks accept that; a hook that needs the gradient fails.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *hooked: Any) -> Tensor:
        ctx.hooked = len(hooked)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *[None] * ctx.hooked


def check_unchanged(tensors: list[Tensor], versions: list[int]) -> None:
    """Raises an error if the tensors that the logits depend on have changed."""
    for t, version in zip(tensors, versions, strict=True):
        if version_of(t) != version:
            raise RuntimeError(
                "logits: the head's weights or the hidden states were changed in place since the forward, so its "
                "logits cannot be computed any more; before optimizer.step(), read outputs.logits or keep "
                "outputs.logits.detach().clone(), or call unpatch_model(model) to have them always"
            )
        if t.numel() and _is_plain(t) and t.untyped_storage().size() == 0:
            raise RuntimeError(
                "logits: the head's weights were freed before the loss was taken, as a sharding wrapper of the head "
                "alone does after its forward; let the head be part of the root's shard group (with FSDP2, no "
                "fully_shard(model.lm_head), or reshard_after_forward=False there). A loss after the model's forward "
                "also needs fully_shard(model, reshard_after_forward=False). Or call unpatch_model(model)"
            )


def version_of(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.device.type != "meta"
