"""The packages that are measured and compared: their names, their versions, and how their losses are imported."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

#: The names of packages in tables, and the distributions that contain them.
PACKAGES = {
    "fused_ignore_ce": "fused_ignore_ce",
    "PyTorch": "torch",
    "Liger": "liger-kernel",
    "TRL": "trl",
    "CCE": "cut-cross-entropy",
    "QuACK": "quack-kernels",
}

#: Classes per tile of logits in TRL. It is the default, which TRL's trainers keep.
TRL_CHUNK = 32768


def version(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*distributions: str) -> dict[str, str]:
    """The versions of those that are installed."""
    return {name: found for name in distributions if (found := version(name))}


def stated(*distributions: str) -> str:
    """The same as a line for people."""
    return ", ".join(f"{name} {found}" for name, found in versions(*distributions).items())


def imported(module: str, name: str) -> Any:
    """A function of a package, which is imported only now."""
    return getattr(importlib.import_module(module), name)


def trl() -> Callable[..., Any]:
    """TRL's function of hidden states, head and targets: log-probabilities, and what else `outputs` names.

    On a CPU, it uses no Triton kernels.
    """
    apply = imported("trl.kernels", "ChunkedLogProbFunction").apply

    def log_probs(h, w, y, *, bias=None, softcap=None, outputs=()):
        return apply(h, w, bias, y, 1.0, TRL_CHUNK, softcap, 1.0, outputs)

    return log_probs
