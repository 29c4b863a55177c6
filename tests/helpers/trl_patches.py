"""Undoes patches of TRL's trainers."""

import sys
from types import SimpleNamespace


def unpatch_trainers():
    """Undoes those of all trainers, also of trainers that nobody holds any more."""
    patching = sys.modules.get("fused_ignore_ce.trl.patching")
    for model in [] if patching is None else list(patching._patches):
        patching.unpatch_trainer(SimpleNamespace(model=model))
