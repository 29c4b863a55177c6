"""Logits that are computed when they are read: a product of hidden states and a head, and the operations after it."""

from .logits import DeferredLogits, defer

__all__ = ["DeferredLogits", "defer"]
