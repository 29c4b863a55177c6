"""The losses as `nn.Module`s."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_backend, check_logits_dtype, ignored_ids
from ..core.tensors import check_process_group, wrong_shape
from ..core.unknown_keywords import explains_keywords
from .cross_entropy import fused_cross_entropy
from .linear_cross_entropy import fused_linear_cross_entropy

#: The options that both losses take and both modules keep as attributes.
_OPTIONS = (
    "ignore_index", "reduction", "label_smoothing", "softcap", "logit_scale", "z_loss", "return_stats", "loss_dtype",
    "zero_if_all_ignored", "process_group", "backend",
)  # fmt: skip


def _options(module: nn.Module, *more: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in (*_OPTIONS, *more)}


def _check(module: Any) -> None:
    """Checks the options, so that a wrong one is an error in the constructor and not at the first step of training."""
    ids = ignored_ids(module.ignore_index)
    LossOptions(ids[0], module.label_smoothing, module.softcap, module.logit_scale, module.z_loss).checked()
    ReductionOptions(
        module.reduction, None, module.return_stats, module.loss_dtype, module.zero_if_all_ignored
    ).checked()
    check_backend(module.backend)
    check_process_group(module.process_group)


class FusedCrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` computed by `fused_cross_entropy`; its constructor takes that function's options too.

    Examples:
        >>> criterion = FusedCrossEntropyLoss(ignore_index=[0, 3])
        >>> criterion(torch.zeros(3, 4), torch.tensor([0, 1, 3])).item()
        1.3862943649291992
    """

    @explains_keywords
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | Collection[int] | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        grad_in_forward: bool = False,
        return_stats: bool | Literal["differentiable"] = False,
        loss_dtype: torch.dtype | None = None,
        zero_if_all_ignored: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, size_average, -100, reduce, reduction, label_smoothing)
        # A collection is an extension; None means -100, as in `nn.LinearCrossEntropyLoss`.
        self.ignore_index = -100 if ignore_index is None else ignore_index  # type: ignore[assignment]  # nn.CrossEntropyLoss declares an int
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward
        self.grad_in_forward = grad_in_forward
        self.return_stats = return_stats
        self.loss_dtype = loss_dtype
        self.zero_if_all_ignored = zero_if_all_ignored
        self.process_group = process_group
        self.backend = backend
        _check(self)

    @explains_keywords
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of logits `input` and `target`, shaped as `fused_cross_entropy` says."""
        return fused_cross_entropy(
            input,
            target,
            self.weight,
            token_weight=token_weight,
            normalizer=normalizer,
            **_options(self, "inplace_backward", "grad_in_forward"),
        )

    def extra_repr(self) -> str:
        names = ("ignore_index", "reduction", "label_smoothing", "softcap", "logit_scale", "z_loss", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class FusedLinearCrossEntropyLoss(nn.Module):
    """`nn.LinearCrossEntropyLoss` computed by `fused_linear_cross_entropy`, with that function's options.

    It owns the linear layer, as PyTorch's does, and their state_dicts are alike: `linear.weight` (C, in_features),
    `linear.bias` and, if given, the class weights `weight`.

    With `external_weight=True` it owns none, and every call is given the head's weight. For a head that shares the
    embeddings' weight, call `criterion(hidden, target, linear_weight=embedding.weight)`. The weight is then a parameter
    of the embedding alone, and once in the state_dict. If it is replaced there (by a cast or FSDP), the next call gets
    the new one.

    Examples:
        >>> criterion = FusedLinearCrossEntropyLoss(2, 4, ignore_index=[0, 3])
        >>> criterion(torch.zeros(3, 2), torch.tensor([0, 1, 3])).item()
        1.3862943649291992
    """

    weight: Tensor | None

    @explains_keywords
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        external_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | Collection[int] | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        memory_budget: int | str | None = None,
        logits_dtype: torch.dtype | None = None,
        return_stats: bool | Literal["differentiable"] = False,
        loss_dtype: torch.dtype | None = None,
        zero_if_all_ignored: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if options is not None:
            raise ValueError(f"options: expected None, since chunks follow from memory_budget, got {options!r}")
        if weight is not None and weight.shape != (num_classes,):
            raise wrong_shape("weight", (num_classes,), weight)
        if external_weight and bias:
            raise ValueError("bias: expected False with external_weight=True, got True; pass linear_bias to each call")
        self.in_features = in_features
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.memory_budget = memory_budget
        self.logits_dtype = logits_dtype
        self.return_stats = return_stats
        self.loss_dtype = loss_dtype
        self.zero_if_all_ignored = zero_if_all_ignored
        self.process_group = process_group
        self.backend = backend
        _check(self)
        budget_bytes(memory_budget)
        check_logits_dtype(logits_dtype)
        self.register_buffer("weight", weight)
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = None if external_weight else nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    @explains_keywords
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of hidden states `input` and `target`, shaped as `fused_linear_cross_entropy` says.

        With `external_weight=True`, `linear_weight` (C, in_features) and an optional `linear_bias` (C) are the head's.
        """
        linear_weight, linear_bias = self._head(linear_weight, linear_bias)
        shape = (self.num_classes, *self.out_features)
        return fused_linear_cross_entropy(
            input,
            linear_weight.view(*shape, self.in_features),
            target,
            linear_bias=None if linear_bias is None else linear_bias.view(shape),
            weight=self.weight,
            token_weight=token_weight,
            normalizer=normalizer,
            **_options(self, "memory_budget", "logits_dtype"),
        )

    def _head(self, linear_weight: Tensor | None, linear_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias: the module's own, or those that a call is given."""
        if self.linear is not None:
            if linear_weight is not None or linear_bias is not None:
                raise ValueError(
                    "linear_weight, linear_bias: expected None, since this module owns its linear layer, got a head; "
                    "build it with external_weight=True to give it the head's weight in each call"
                )
            return self.linear.weight, self.linear.bias
        rows = math.prod(self.out_features, start=self.num_classes)
        if linear_weight is None or linear_weight.numel() != rows * self.in_features:
            got = None if linear_weight is None else tuple(linear_weight.shape)
            raise ValueError(
                f"linear_weight: expected shape {(rows, self.in_features)}, since this module was built with "
                f"external_weight=True, got {got}"
            )
        return linear_weight, linear_bias

    def extra_repr(self) -> str:
        names = ("in_features", "num_classes", "out_features", "ignore_index", "reduction", "label_smoothing",
                 "softcap", "logit_scale", "z_loss", "memory_budget", "backend")  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
