"""Cross entropy for language models that is lean in memory and free for every token that is ignored."""

from typing import TYPE_CHECKING, Any

from .core.reduction import LossStats
from .linear.plan import LinearPlan, plan_linear_loss
from .losses.causal_lm import fused_causal_lm_loss, fused_linear_causal_lm_loss
from .losses.cross_entropy import fused_cross_entropy
from .losses.distillation import fused_distillation_loss, fused_linear_distillation_loss
from .losses.distillation_modules import (
    FusedDistillationLoss,
    FusedLinearDistillationLoss,
    FusedTopKDistillationLoss,
)
from .losses.linear_cross_entropy import fused_linear_cross_entropy
from .losses.log_probs import fused_linear_log_probs
from .losses.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss
from .losses.top_k_distillation import fused_top_k_distillation_loss

if TYPE_CHECKING:
    from .deferred.heads import defer_logits, undefer_logits

__all__ = [
    "FusedCrossEntropyLoss",
    "FusedDistillationLoss",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDistillationLoss",
    "FusedTopKDistillationLoss",
    "LinearPlan",
    "LossStats",
    "defer_logits",
    "fused_causal_lm_loss",
    "fused_cross_entropy",
    "fused_distillation_loss",
    "fused_linear_causal_lm_loss",
    "fused_linear_cross_entropy",
    "fused_linear_distillation_loss",
    "fused_linear_log_probs",
    "fused_top_k_distillation_loss",
    "plan_linear_loss",
    "undefer_logits",
]
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """Imports what needs PyTorch's compiler once it is asked for: the compiler takes a second to import."""
    if name in ("defer_logits", "undefer_logits"):
        from .deferred import heads

        return getattr(heads, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
