"""Patched trainers of TRL: its head's log-probabilities and entropies. Models are patched by `hf`."""

from .patching import patch_trainer, unpatch_trainer

__all__ = ["patch_trainer", "unpatch_trainer"]
