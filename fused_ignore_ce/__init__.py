"""Cross entropy for language models that is lean in memory and free for every token that is ignored."""

from .core.reduction import LossStats
from .linear.plan import LinearPlan, plan_linear_loss
from .losses.causal_lm import fused_causal_lm_loss, fused_linear_causal_lm_loss
from .losses.cross_entropy import fused_cross_entropy
from .losses.linear_cross_entropy import fused_linear_cross_entropy
from .losses.log_probs import fused_linear_log_probs
from .losses.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss

__all__ = [
    "FusedCrossEntropyLoss",
    "FusedLinearCrossEntropyLoss",
    "LinearPlan",
    "LossStats",
    "fused_causal_lm_loss",
    "fused_cross_entropy",
    "fused_linear_causal_lm_loss",
    "fused_linear_cross_entropy",
    "fused_linear_log_probs",
    "plan_linear_loss",
]
__version__ = "0.2.0"
