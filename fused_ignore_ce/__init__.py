"""Cross entropy for language models that is lean in memory and free for every token that is ignored."""

from .causal_lm import fused_causal_lm_loss
from .functional import LossStats, fused_cross_entropy
from .modules import FusedCrossEntropyLoss

__all__ = ["FusedCrossEntropyLoss", "LossStats", "fused_causal_lm_loss", "fused_cross_entropy"]
__version__ = "0.1.0"
