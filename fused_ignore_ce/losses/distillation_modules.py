"""The distillation losses as `nn.Module`s, whose constructors take what does not belong to one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.distillation import DistillationOptions, refuse_process_group
from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_backend, check_logits_dtype, ignored_ids
from ..core.unknown_keywords import unknown_keyword
from .distillation import fused_distillation_loss, fused_linear_distillation_loss
from .top_k_distillation import fused_top_k_distillation_loss

_OF_A_BATCH = ("linear_bias", "teacher_bias", "token_weight", "normalizer")


class _DistillationLoss(torch.nn.Module):
    """A module with the options of `_function` as attributes; a wrong one is an error in the constructor."""

    _function: ClassVar[Callable[..., Any]]
    _defaults: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls._function).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OF_A_BATCH]
        cls._defaults = {p.name: p.default for p in options}
        cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # read by `inspect.signature`

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self._defaults:
                raise TypeError(unknown_keyword(type(self).__name__, name, tuple(self._defaults)))
        for name, default in self._defaults.items():
            setattr(self, name, options.get(name, default))
        given = self._options()
        of_student = LossOptions(
            ignored_ids(given["ignore_index"])[0], softcap=given["softcap"], logit_scale=given["logit_scale"]
        )
        of_rows = {name: given[name] for name in DistillationOptions._fields if name in given}
        DistillationOptions(of_student, **of_rows).checked()
        ReductionOptions(given["reduction"], None, given["return_stats"], given["loss_dtype"]).checked()
        budget_bytes(given.get("memory_budget"))
        check_logits_dtype(given.get("logits_dtype"))
        check_backend(given["backend"])
        refuse_process_group(given["process_group"])

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults}

    def _call(self, *tensors: Any, **of_batch: Any) -> Any:
        return type(self)._function(*tensors, **of_batch, **self._options())

    def extra_repr(self) -> str:
        changed = {name: value for name, value in self._options().items() if value != self._defaults[name]}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


class FusedDistillationLoss(_DistillationLoss):
    """`fused_distillation_loss` as a module; its constructor takes that function's options.

    Examples:
        >>> criterion = FusedDistillationLoss(divergence="reverse_kl", temperature=2.0)
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """

    _function: ClassVar[Callable[..., Any]] = staticmethod(fused_distillation_loss)

    def forward(
        self,
        input: Tensor,
        teacher_input: Tensor,
        target: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of the logits of both sides, (..., V), and of target, (...)."""
        return self._call(input, teacher_input, target, token_weight=token_weight, normalizer=normalizer)


class FusedLinearDistillationLoss(_DistillationLoss):
    """`fused_linear_distillation_loss` as a module; its constructor takes that function's options.

    It owns no head: each call is given those of both sides, whose parameters stay where they are.

    Examples:
        >>> criterion = FusedLinearDistillationLoss(divergence="jsd", beta=0.1)
        >>> criterion(torch.ones(3, 2), torch.zeros(4, 2), torch.ones(3, 5), torch.zeros(4, 5)).item()
        0.0
    """

    _function: ClassVar[Callable[..., Any]] = staticmethod(fused_linear_distillation_loss)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        *,
        linear_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of the hidden states and heads of both sides, shaped as `fused_linear_distillation_loss` says."""
        return self._call(
            input, linear_weight, teacher_input, teacher_weight, target, linear_bias=linear_bias,
            teacher_bias=teacher_bias, token_weight=token_weight, normalizer=normalizer,
        )  # fmt: skip


class FusedTopKDistillationLoss(_DistillationLoss):
    """`fused_top_k_distillation_loss` as a module; its constructor takes that function's options.

    Examples:
        >>> criterion = FusedTopKDistillationLoss(tail="renormalise")
        >>> ids, log_probs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log()
        >>> criterion(torch.ones(1, 2), torch.zeros(4, 2), ids, log_probs).item()
        0.0
    """

    _function: ClassVar[Callable[..., Any]] = staticmethod(fused_top_k_distillation_loss)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        *,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of hidden states, the student's head and the teacher's likeliest classes of every token."""
        return self._call(
            input, linear_weight, teacher_ids, teacher_log_probs, target, linear_bias=linear_bias,
            token_weight=token_weight, normalizer=normalizer,
        )  # fmt: skip
