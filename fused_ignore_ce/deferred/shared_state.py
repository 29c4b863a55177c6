"""What all tensors made from the logits of one forward share: its options, and what became of the logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..core.eager import is_tracing
from .report import Recorder
from .settings import Settings


class SharedState:
    """The state shared by all tensors that were made from the logits of one forward."""

    def __init__(self, settings: Settings | None = None, recorder: Recorder | None = None) -> None:
        self.settings = settings or Settings()
        self.recorder = recorder or Recorder()
        self.in_forward = False
        #: Whether a product was deferred, whether that was the head's, and whether a loss took the options.
        self.deferred = self.head_deferred = self.used = False
        #: `LossStats` of the forward's first cross entropy, if `patch_model` was asked for them.
        self.stats: Any = None
        #: Whether a loss was taken without logits, and whether something computed logits.
        self.fused = self._read = False
        #: What the forward will divide a sum by, if 0 / 0 is to be 0: 1 is written into it where that would be.
        self.divisor: Tensor | None = None
        #: Why nothing could be fused, and what read the logits first.
        self.why_not = self.reader = ""
        #: The size of the vocabulary.
        self.classes = 0
        #: Bytes that the head's products would take, and how many of them the recorder has counted.
        self.size = self.counted = 0

    @property
    def read(self) -> bool:
        return self._read

    @property
    def of_rows(self) -> dict[str, Any]:
        """The options that say how log-probabilities and divergences of rows are computed."""
        return {k: v for k, v in self.settings.options.items() if k in ("memory_budget", "logits_dtype", "backend")}

    def extended(self, options: dict[str, Any], target: Tensor) -> dict[str, Any]:
        """The options of a loss that takes those of `patch_model`."""
        self.used = True
        return self.settings.extend(options, target)

    def asked_stats(self) -> dict[str, bool]:
        """The keyword that makes a loss in the forward return statistics."""
        return {"return_stats": True} if self.settings.return_stats and self.in_forward else {}

    def without_stats(self, result: Any) -> Tensor:
        """The loss; the statistics that came with it are kept for the forward's outputs."""
        loss: Tensor
        loss, stats = result if isinstance(result, tuple) else (result, None)
        if self.stats is None:
            self.stats = stats
        return loss

    def took(self, kind: str, tokens: int, ignored: Tensor | None = None) -> None:
        """Notes that a loss was computed without logits."""
        if is_tracing():
            return
        self.fused = True
        self._count(0 if self.read else self.size)
        self.recorder.add(kind, tokens, ignored)

    def took_of_logits(self, kind: str, tokens: int, ignored: Tensor | None) -> None:
        """Notes that a loss of this package was computed from logits that exist."""
        if not is_tracing():
            self.recorder.add(kind, tokens, ignored, fused=False)

    def was_read(self, operation: str) -> None:
        self._read = True
        self._count(0)
        reader = self.recorder.add_read(operation)
        self.reader = self.reader or reader

    def was_not_fused(self, reason: str) -> None:
        """Notes why a head was not deferred, or why a forward fused nothing."""
        self.why_not = self.why_not or reason
        self.recorder.add_not_fused(reason)

    def _count(self, size: int) -> None:
        counted, self.counted = self.counted, size
        self.recorder.add_bytes(size - counted)

    @property
    def changes(self) -> str:
        """Names of the options that a loss has to take."""
        return self.settings.changes

    def guard(self, value: Tensor) -> None:
        """Makes a gradient of a tensor that was made of the logits an error: its loss missed the options."""
        if self.changes and value.requires_grad and torch.is_grad_enabled():
            value.register_hook(functools.partial(_refuse, self.changes))


class JointState(SharedState):
    """The state of an expression of several models' logits, such as a divergence. What it notes, it notes for each."""

    def __init__(self, states: list[SharedState]) -> None:
        super().__init__(states[0].settings)
        self.states = states

    def took(self, kind: str, tokens: int, ignored: Tensor | None = None) -> None:
        for state in self.states:
            state.took(kind, tokens, ignored)

    @property
    def read(self) -> bool:
        return any(state.read for state in self.states)

    @property
    def of_rows(self) -> dict[str, Any]:
        """Those of all models; the first one's, where they differ."""
        return {k: v for state in reversed(self.states) for k, v in state.of_rows.items()}

    def was_read(self, operation: str) -> None:
        for state in self.states:
            state.was_read(operation)

    @property
    def changes(self) -> str:
        return next((state.changes for state in self.states if state.changes), "")


def joint(states: list[SharedState]) -> SharedState:
    """The common state of an expression whose logits have these states."""
    parts = [part for state in states for part in getattr(state, "states", [state])]
    different = list({id(part): part for part in parts}.values())
    return different[0] if len(different) == 1 else JointState(different)


def _refuse(changes: str, gradient: Tensor) -> None:
    raise RuntimeError(
        f"{changes}: given to patch_model, but this loss was taken of the model's logits by something other "
        "than a cross entropy over class indices, which cannot use it. Patch the model without these options, or "
        "take the loss by torch.nn.functional.cross_entropy(outputs.logits, labels)"
    )
