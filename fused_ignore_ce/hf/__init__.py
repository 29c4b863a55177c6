"""Patched transformers models: patching, the report and a data collator. Their logits are in `deferred`."""

from ..deferred.report import FusionReport
from .collator import IgnoreTokens
from .patching import fusion_report, patch_model, patch_transformers, unpatch_model, unpatch_transformers

__all__ = [
    "FusionReport",
    "IgnoreTokens",
    "fusion_report",
    "patch_model",
    "patch_transformers",
    "unpatch_model",
    "unpatch_transformers",
]
