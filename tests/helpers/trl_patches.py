"""Undoes patches of TRL's trainers."""

import sys
from types import SimpleNamespace


def unpatch_trainers():
    """Undoes those of all trainers, and puts back TRL's functions where patched models are no more."""
    patching, utils = (sys.modules.get(name) for name in ("fused_ignore_ce.trl.patching", "trl.trainer.utils"))
    if patching is None or utils is None:
        return
    for model in list(patching._patches):
        patching.unpatch_trainer(SimpleNamespace(model=model))
    if isinstance(utils._ChunkedLogProbFunction, patching._LogProbs):
        utils._ChunkedLogProbFunction = utils._ChunkedLogProbFunction.own
        utils._use_triton = utils._use_triton.own
