"""Which model some deferred logits come from: its options, which travel with them, and its report."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.options import ignored_ids
from .report import Recorder


class Settings(NamedTuple):
    """The arguments of `patch_model`."""

    ignore_index: tuple[int, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (never written)
    without_labels: bool = False
    return_stats: bool = False

    @property
    def changes(self) -> str:
        """Names of the options that change the loss's value."""
        others = ("memory_budget", "backend", "zero_if_all_ignored")
        names = [name for name in self.options if name not in others]
        return ", ".join(["ignore_index"] * bool(self.ignore_index) + names)

    def extend(self, options: dict[str, Any], target: Tensor) -> dict[str, Any]:
        """The options of a cross entropy that other code asks for, extended by those of `patch_model`."""
        given = dict(self.options)
        if "weight" in given:
            if options.get("weight") is not None:
                raise ValueError("weight: given to patch_model, but the model's own cross entropy has class weights")
            given["weight"] = given["weight"].to(target.device)
        if self.ignore_index:
            own = ignored_ids(options.get("ignore_index", -100))
            given["ignore_index"] = tuple(dict.fromkeys((*own, *self.ignore_index)))
            if options.get("reduction", "mean") != "mean":
                self._check_nothing_more_is_ignored(f"reduction={options['reduction']!r}", target, own)
            elif options.get("normalizer") is not None:
                self._check_nothing_more_is_ignored("a normalizer", target, own)
        return {**options, **given}

    def _check_nothing_more_is_ignored(self, asked: str, target: Tensor, own: tuple[int, ...]) -> None:
        """Raises an error where the caller will divide a sum by a count that includes tokens of `ignore_index`.

        This reads the targets and so waits for the device, as the linear loss does right afterwards. While
        torch.compile traces or a CUDA graph is captured, it is an asynchronous assertion.
        """
        if target.is_floating_point():
            return
        more = torch.zeros((), dtype=torch.bool, device=target.device)
        for index in self.ignore_index:
            if index not in own:
                more = more | (target == index).any()
        message = (
            f"ignore_index: patch_model was given {list(self.ignore_index)}, and labels hold such ids, but the loss "
            f"is asked for with {asked}, so that its divisor (num_items_in_batch, for instance) is "
            "counted by the caller, who counts those tokens. Set their labels to -100 before anything counts them: "
            "wrap the data collator as fused_ignore_ce.hf.IgnoreTokens(collator, ids)"
        )
        captured = target.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or captured:
            torch._assert_async(~more, message)
        elif more:
            raise ValueError(message)


class Origin:
    """The state shared by all tensors that were made from the logits of one forward."""

    def __init__(self, settings: Settings | None = None, recorder: Recorder | None = None) -> None:
        self.settings = settings or Settings()
        self.recorder = recorder or Recorder()
        self.in_forward = False
        #: Whether the forward deferred a product, and whether its mode saw a loss that the options apply to.
        self.deferred = self.used = False
        #: `LossStats` of the forward's first cross entropy, if `patch_model` was asked for them.
        self.stats: Any = None
        #: Whether a loss was taken without logits, and whether something computed logits.
        self.fused = False
        self.read = False
        #: Bytes that the head's products would take, and how many of them the recorder has counted.
        self.size = self.counted = 0

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
        if torch.compiler.is_compiling():
            return
        self.fused = True
        self._count(0 if self.read else self.size)
        self.recorder.add(kind, tokens, ignored)

    def took_of_logits(self, kind: str, tokens: int, ignored: Tensor | None) -> None:
        """Notes that a loss of this package was computed from logits that exist."""
        if not torch.compiler.is_compiling():
            self.recorder.add(kind, tokens, ignored, fused=False)

    def was_read(self, operation: str) -> None:
        self.read = True
        self._count(0)
        self.recorder.add_read(operation)

    def _count(self, size: int) -> None:
        self.recorder.bytes += size - self.counted
        self.counted = size

    def guarded(self, value: Any) -> Any:
        """The logits for code after the forward, where a gradient of a loss that missed the options is an error."""
        changes = self.settings.changes
        if not changes or self.in_forward or not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if not torch.is_grad_enabled():
            return value
        return _Guard.apply(value, changes)


class JointOrigin(Origin):
    """The origin of an expression of several models' logits, such as a divergence. What it notes, it notes for each."""

    def __init__(self, origins: list[Origin]) -> None:
        super().__init__(origins[0].settings)
        self.origins = origins

    def took(self, kind: str, tokens: int, ignored: Tensor | None = None) -> None:
        for origin in self.origins:
            origin.took(kind, tokens, ignored)

    def was_read(self, operation: str) -> None:
        self.read = True
        for origin in self.origins:
            origin.was_read(operation)

    def guarded(self, value: Any) -> Any:
        for origin in self.origins:
            value = origin.guarded(value)
        return value


def joint(origins: list[Origin]) -> Origin:
    """The common origin of an expression whose logits have these origins."""
    parts = [part for origin in origins for part in getattr(origin, "origins", [origin])]
    different = list({id(part): part for part in parts}.values())
    return different[0] if len(different) == 1 else JointOrigin(different)


class _Guard(torch.autograd.Function):
    """Identity; a gradient that arrives comes from a loss that the options did not reach."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, changes: str) -> Tensor:
        ctx.changes = changes
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return None, None
        raise RuntimeError(
            f"{ctx.changes}: given to patch_model, but this loss was taken of the model's logits by something other "
            "than a cross entropy over class indices, which cannot use it. Patch the model without these options, or "
            "take the loss by torch.nn.functional.cross_entropy(outputs.logits, labels)"
        )
