"""Which model some deferred logits come from: its options, which travel with them, and its report."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_backend, ignored_ids
from ..core.unknown_keywords import unknown_keyword
from .report import Recorder


class Settings(NamedTuple):
    """The arguments of `patch_model`."""

    ignore_index: tuple[int, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (never written)
    return_stats: bool = False
    keep_logits: bool = False

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


_OPTIONS = ("weight", "label_smoothing", "softcap", "logit_scale", "z_loss", "zero_if_all_ignored", "backend")


def settings_of(
    function: str,
    ignore_index: Any,
    memory_budget: Any,
    return_stats: Any,
    loss_options: dict[str, Any],
    keep_logits: Any = False,
) -> Settings:
    """The settings for the arguments that a function was given, checked."""
    for name, value in (("return_stats", return_stats), ("keep_logits", keep_logits)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    for name in loss_options:
        if name not in _OPTIONS:
            known = ("ignore_index", "memory_budget", "return_stats", "keep_logits", *_OPTIONS)
            raise TypeError(unknown_keyword(function, name, known))
    given = {name: value for name, value in loss_options.items() if value is not None}
    LossOptions(**{name: given[name] for name in LossOptions._fields if name in given}).checked()
    ReductionOptions(zero_if_all_ignored=given.get("zero_if_all_ignored", False)).checked()
    check_backend(given.get("backend", "auto"))
    memory_budget = budget_bytes(memory_budget)
    if "weight" in given and not isinstance(given["weight"], Tensor):
        raise TypeError(f"weight: expected a Tensor of class weights, got {type(given['weight']).__name__}")
    if memory_budget is not None:
        given["memory_budget"] = memory_budget
    ids = () if ignore_index is None else ignored_ids(ignore_index)
    return Settings(ids, given, return_stats, keep_logits)


class Origin:
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
        #: The size of the vocabulary.
        self.classes = 0
        #: Bytes that the head's products would take, and how many of them the recorder has counted.
        self.size = self.counted = 0

    @property
    def read(self) -> bool:
        return self._read

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
        self._read = True
        self._count(0)
        self.recorder.add_read(operation)

    def _count(self, size: int) -> None:
        self.recorder.bytes += size - self.counted
        self.counted = size

    @property
    def changes(self) -> str:
        """Names of the options that a loss has to take."""
        return self.settings.changes

    def guard(self, value: Tensor) -> None:
        """Makes a gradient of a tensor that was made of the logits an error: its loss missed the options."""
        if self.changes and value.requires_grad and torch.is_grad_enabled():
            value.register_hook(functools.partial(_refuse, self.changes))


class JointOrigin(Origin):
    """The origin of an expression of several models' logits, such as a divergence. What it notes, it notes for each."""

    def __init__(self, origins: list[Origin]) -> None:
        super().__init__(origins[0].settings)
        self.origins = origins

    def took(self, kind: str, tokens: int, ignored: Tensor | None = None) -> None:
        for origin in self.origins:
            origin.took(kind, tokens, ignored)

    @property
    def read(self) -> bool:
        return any(origin.read for origin in self.origins)

    def was_read(self, operation: str) -> None:
        for origin in self.origins:
            origin.was_read(operation)

    @property
    def changes(self) -> str:
        return next((origin.changes for origin in self.origins if origin.changes), "")


def joint(origins: list[Origin]) -> Origin:
    """The common origin of an expression whose logits have these origins."""
    parts = [part for origin in origins for part in getattr(origin, "origins", [origin])]
    different = list({id(part): part for part in parts}.values())
    return different[0] if len(different) == 1 else JointOrigin(different)


def _refuse(changes: str, gradient: Tensor) -> None:
    raise RuntimeError(
        f"{changes}: given to patch_model, but this loss was taken of the model's logits by something other "
        "than a cross entropy over class indices, which cannot use it. Patch the model without these options, or "
        "take the loss by torch.nn.functional.cross_entropy(outputs.logits, labels)"
    )
