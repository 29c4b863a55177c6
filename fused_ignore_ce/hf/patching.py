"""One call for any transformers model: its loss is computed by this package, without logits where possible.

While the forward of a patched model runs with labels, the product of hidden states and head is deferred. Any cross
entropy of these logits is computed by this package, in the forward or later. No model is named, no forward is copied.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..core.optional_packages import needed
from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_backend, ignored_ids
from ..core.unknown_keywords import unknown_keyword
from ..deferred.forward import has_head, is_label, patched_forward, process_wide, recorder_of
from ..deferred.origin import Settings
from ..deferred.report import FusionReport

_OPTIONS = ("weight", "label_smoothing", "softcap", "logit_scale", "z_loss", "zero_if_all_ignored", "backend")


def patch_model(
    model: nn.Module,
    *,
    ignore_index: int | Collection[int] | None = None,
    memory_budget: int | str | None = None,
    without_labels: bool = False,
    return_stats: bool = False,
    **loss_options: Any,
) -> nn.Module:
    """Lets a transformers model take its loss from hidden states and head, whenever it is called with labels.

    Equivalent to the same model with `F.cross_entropy(logits, labels, ...)` replaced by
    `fused_linear_cross_entropy(hidden, head.weight, labels, ...)`: loss and gradients are the same.

    Args:
        model: a `PreTrainedModel`, or a module that holds one (PEFT, DDP, torch.compile's). Changed in place.
        ignore_index: an id or a collection of ids to ignore, beside those that the model ignores (-100).
        memory_budget: bytes of scratch, an int or a string such as "512MiB", as in `fused_linear_cross_entropy`.
        without_labels: also defer the logits of forwards with gradients that get no labels, in training mode or not
            (`from_pretrained` returns models that are not), so that a loss which is taken of `outputs.logits`
            afterwards is fused.
        return_stats: `outputs.loss_stats` is then the `LossStats` of the loss that the forward took.
        loss_options: weight, label_smoothing, softcap, logit_scale, z_loss, zero_if_all_ignored, backend, as in
            `fused_linear_cross_entropy`; they apply to every cross entropy over the head's classes, in the forward
            and after it.

    Returns:
        model. `outputs.logits` is a `DeferredLogits`: computed when it is read.

    Raises:
        TypeError: no transformers model; a misspelled option.
        ValueError, RuntimeError: a model without a head; an option out of its range. In a forward: RuntimeError where
            the model takes no cross entropy that the given options could apply to, and where it is trained without
            labels, with options, and not by `without_labels=True`. ValueError where `ignore_index` ignores a token of
            a loss that is asked for as a sum, whose divisor somebody else counts (`num_items_in_batch`):
            `IgnoreTokens` is what to do. In a backward: RuntimeError where a loss was taken of the logits by other
            means than a cross entropy, which the options did not reach.

    Note:
        Generation, and forwards without labels and gradients, run the model's own code. Patching again replaces the
        options. A model that was saved and loaded again is not patched.
    """
    settings = _settings(ignore_index, memory_budget, without_labels, return_stats, loss_options)
    models = _transformers_models(model)
    if not any(map(has_head, models)) and not any(map(_takes_labels, models)):
        raise ValueError(
            f"model: expected a model with a head, whose loss can be taken, got {type(models[0]).__name__}, which has "
            "no output embeddings and whose forward takes no labels; patch the model around it (...ForCausalLM, say)"
        )
    for inner in models:
        recorder_of(inner, fresh=True)
        cls: Any = type(inner)
        if not hasattr(cls, "_fused_ignore_ce_of"):
            inner.__class__ = _patched_class(cls)
            if "forward" in inner.__dict__:
                inner.forward = inner.__dict__["forward"]
        inner._fused_ignore_ce = settings
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes `patch_model`, bit for bit; without effect on a model that is not patched. Returns model."""
    for inner in _transformers_models(model):
        inner.__dict__.pop("_fused_ignore_ce", None)
        cls: Any = type(inner)
        if "_fused_ignore_ce_of" in cls.__dict__:
            inner.__class__ = cls._fused_ignore_ce_of
            own = inner.__dict__.get("forward")
            if own is not None:
                inner.__dict__["forward"] = own.__func__._fused_ignore_ce_of
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """The report on a model's logits since it was patched: the losses that were fused, and what read the logits.

    Args:
        model: a patched model, or a module that holds one.

    Returns:
        A `FusionReport`, which prints as a table.

    Raises:
        TypeError: no transformers model.

    Note:
        Counting does not wait for the device; this function does.
    """
    reports = [recorder_of(inner).report() for inner in _transformers_models(model)]
    total = reports[0]
    for other in reports[1:]:
        total.add(other)
    return total


class patch_transformers:  # a function that is also a context manager
    """`patch_model` for every transformers model of the process, created before or afterwards.

    A model that was patched itself keeps its options. As a context manager, it ends with the block.

    Examples:
        >>> with patch_transformers(ignore_index=0):
        ...     pass
    """

    def __init__(
        self,
        *,
        ignore_index: int | Collection[int] | None = None,
        memory_budget: int | str | None = None,
        without_labels: bool = False,
        return_stats: bool = False,
        **loss_options: Any,
    ) -> None:
        settings = _settings(ignore_index, memory_budget, without_labels, return_stats, loss_options)
        self._before = process_wide.settings
        process_wide.settings = settings
        _patch_classes()

    def __enter__(self) -> patch_transformers:
        return self

    def __exit__(self, *exc: object) -> None:
        unpatch_transformers()
        if self._before is not None:
            process_wide.settings = self._before
            _patch_classes()


def unpatch_transformers() -> None:
    """Undoes `patch_transformers`; models patched by `patch_model` stay patched."""
    process_wide.settings = None
    while _PATCHED_CLASSES:
        cls, name, original = _PATCHED_CLASSES.pop()
        if original is None:
            delattr(cls, name)
        else:
            setattr(cls, name, original)


def _settings(
    ignore_index: Any, memory_budget: Any, without_labels: Any, return_stats: Any, loss_options: dict[str, Any]
) -> Settings:
    for name, value in (("without_labels", without_labels), ("return_stats", return_stats)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    for name in loss_options:
        if name not in _OPTIONS:
            known = ("ignore_index", "memory_budget", "without_labels", "return_stats", *_OPTIONS)
            raise TypeError(unknown_keyword("patch_model", name, known))
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
    return Settings(ids, given, without_labels, return_stats)


def _transformers_models(model: Any) -> list[Any]:
    """The outermost transformers model, and those inside it that take labels, as some models hand their labels on."""
    base = needed("transformers", "hf").PreTrainedModel
    modules = model.modules() if isinstance(model, nn.Module) else ()
    models = [module for module in modules if isinstance(module, base)]
    if not models:
        what, hint = f"got {type(model).__name__}", ""
        if isinstance(model, type):
            what, hint = f"got the class {model.__name__}", "; pass an instance, or call patch_transformers()"
        elif isinstance(getattr(model, "model", None), base):
            hint = "; pass its .model"
        raise TypeError(f"model: expected a transformers PreTrainedModel or a module that holds one, {what}{hint}")
    return models[:1] + [m for m in models[1:] if _takes_labels(m)]


def _takes_labels(model: nn.Module) -> bool:
    return any(map(is_label, inspect.signature(model.forward).parameters))


@functools.cache
def _patched_class(cls: type) -> type:
    """A subclass of the same name whose forward is patched; instances pickle and copy as such."""
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_fused_ignore_ce_of": cls,
        "forward": patched_forward(cls.forward),  # type: ignore[attr-defined]  # of a module class
        "__setattr__": _set_attribute,
    }
    return type(cls)(cls.__name__, (cls,), body)


def _set_attribute(self: Any, name: str, value: Any) -> None:
    """Patches a forward that other code (accelerate, TRL) sets on the instance."""
    super(_own_class(self), self).__setattr__(name, _patched_method(self, value) if name == "forward" else value)


def _patched_method(model: Any, forward: Any) -> Any:
    if getattr(forward, "__self__", None) is model:
        patched: Any = patched_forward(forward.__func__)
    else:
        called: Any = functools.wraps(forward)(lambda _, *args, **kwargs: forward(*args, **kwargs))
        called._fused_ignore_ce_set = forward
        patched = patched_forward(called)
    patched._fused_ignore_ce_of = forward
    return MethodType(patched, model)


def _own_class(model: Any) -> Any:
    """The patched class: the model's own, or the base that a sharding wrapper (FSDP2) derived the model's from."""
    return next(cls for cls in type(model).__mro__ if "_fused_ignore_ce_of" in cls.__dict__)


def _reduce(self: Any, protocol: Any) -> Any:
    cls = _own_class(self)
    _, args, *rest = super(cls, self).__reduce_ex__(max(2, protocol))
    return _rebuild, (cls._fused_ignore_ce_of, *args[1:]), *rest


def _rebuild(cls: type, *args: Any) -> Any:
    patched = _patched_class(cls)
    return patched.__new__(patched, *args)


#: (class, attribute, what it was; None if it was inherited)
_PATCHED_CLASSES: list[tuple[type, str, Any]] = []


def _patch_classes() -> None:
    """Patches forward in all classes of models there are, and in those that will be defined."""
    PreTrainedModel = needed("transformers", "hf").PreTrainedModel
    if _PATCHED_CLASSES:
        return
    define = PreTrainedModel.__dict__.get("__init_subclass__")

    def init_subclass(cls: type, **kwargs: Any) -> None:
        if define is not None:
            define.__func__(cls, **kwargs)
        else:
            super(PreTrainedModel, cls).__init_subclass__(**kwargs)
        _patch_class(cls)

    if define is not None:
        _PATCHED_CLASSES.append((PreTrainedModel, "__init_subclass__", define))
        PreTrainedModel.__init_subclass__ = classmethod(init_subclass)  # type: ignore[arg-type]  # a class is a type
    classes = [PreTrainedModel]
    for cls in classes:
        classes += cls.__subclasses__()
        _patch_class(cls)


def _patch_class(cls: Any) -> None:
    from transformers import PreTrainedModel

    if "_fused_ignore_ce_of" in cls.__dict__:
        return
    owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    if owner is cls or (not issubclass(owner, PreTrainedModel) and owner is not nn.Module):  # its own, or a mixin's
        _PATCHED_CLASSES.append((cls, "forward", cls.__dict__.get("forward")))
        cls.forward = patched_forward(owner.__dict__["forward"])
