"""Logits that are computed when somebody reads them: the product of hidden states and a head, and what followed it."""

from .logits import DeferredLogits, defer

__all__ = ["DeferredLogits", "defer"]
