"""Logits that are computed when they are read, and the losses taken of them. Models are patched by `hf`."""

from .logits import DeferredLogits, defer

__all__ = ["DeferredLogits", "defer"]
