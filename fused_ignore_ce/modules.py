"""The nn.Module faces of the functions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from . import arguments
from .functional import fused_cross_entropy


class FusedCrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` computed by `fused_cross_entropy`; its constructor takes that function's options too.

    >>> criterion = FusedCrossEntropyLoss(ignore_index=[0, 3])
    >>> criterion(torch.zeros(3, 4), torch.tensor([0, 1, 3])).item()
    1.3862943649291992
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | Collection[int] = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        inplace_backward: bool = False,
        return_stats: bool = False,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, size_average, -100, reduce, reduction, label_smoothing)
        self.ignore_index = ignore_index  # type: ignore[assignment]  # a collection is an extension
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward
        self.return_stats = return_stats
        self.process_group = process_group
        self.backend = backend
        # A wrong option is an error here, where it is written, not at the first step of training.
        arguments.row_options(arguments.ignored_ids(ignore_index)[0], label_smoothing, softcap, logit_scale, z_loss)
        arguments.check_reduction(self.reduction, None)
        arguments.check_backend(backend)
        arguments.check_not_distributed(process_group)

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
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            token_weight=token_weight,
            normalizer=normalizer,
            inplace_backward=self.inplace_backward,
            return_stats=self.return_stats,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        names = ("ignore_index", "reduction", "label_smoothing", "softcap", "logit_scale", "z_loss", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
