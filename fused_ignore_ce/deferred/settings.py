"""The arguments of `patch_model`: the options that its losses take, and how."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.eager import is_tracing
from ..core.options import (
    LossOptions,
    ReductionOptions,
    budget_bytes,
    check_backend,
    check_flag,
    check_logits_dtype,
    ignored_ids,
)
from ..core.unknown_keywords import unknown_keyword


class Settings(NamedTuple):
    """The arguments of `patch_model`."""

    ignore_index: tuple[int, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (never written)
    return_stats: bool = False
    keep_logits: bool = False

    @property
    def changes(self) -> str:
        """Names of the options that change the loss's value."""
        others = ("memory_budget", "logits_dtype", "backend", "zero_if_all_ignored")
        names = [name for name in self.options if name not in others]
        return ", ".join(["ignore_index"] * bool(self.ignore_index) + names)

    def extend(self, options: dict[str, Any], target: Tensor) -> dict[str, Any]:
        """The options of a cross entropy that other code asks for, extended by those of `patch_model`."""
        given = dict(self.options)
        if "weight" in given:
            if options.get("weight") is not None:
                raise ValueError(
                    "weight: given to patch_model, but the model's own cross entropy has class weights; leave out one"
                )
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
        if is_tracing() or captured:
            torch._assert_async(~more, message)
        elif more:
            raise ValueError(message)


_OPTIONS = (
    "weight",
    "label_smoothing",
    "softcap",
    "logit_scale",
    "z_loss",
    "zero_if_all_ignored",
    "logits_dtype",
    "backend",
)


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
        check_flag(name, value)
    for name in loss_options:
        if name not in _OPTIONS:
            known = ("ignore_index", "memory_budget", "return_stats", "keep_logits", *_OPTIONS)
            raise TypeError(unknown_keyword(function, name, known))
    given = {name: value for name, value in loss_options.items() if value is not None}
    LossOptions(**{name: given[name] for name in LossOptions._fields if name in given}).checked()
    ReductionOptions(zero_if_all_ignored=given.get("zero_if_all_ignored", False)).checked()
    check_backend(given.get("backend", "auto"))
    check_logits_dtype(given.get("logits_dtype"))
    memory_budget = budget_bytes(memory_budget)
    if "weight" in given and not isinstance(given["weight"], Tensor):
        raise TypeError(f"weight: expected a Tensor of class weights, got {type(given['weight']).__name__}")
    if memory_budget is not None:
        given["memory_budget"] = memory_budget
    ids = () if ignore_index is None else ignored_ids(ignore_index)
    return Settings(ids, given, return_stats, keep_logits)
