"""One call for any transformers model: its loss is computed by this package, without logits where possible.

The head of a patched model defers its product whenever gradients are enabled, or its forward is given labels. Any cross
entropy of these logits is computed by this package, in the forward or later. No model is named, no forward is copied.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from types import MethodType
from typing import Any

from torch import nn

from ..core.optional_packages import needed
from ..core.options import check_flag
from ..deferred.heads import PATCH, Patch, make_head, unmake
from ..deferred.replaced import REPLACED, replace_class, with_forward
from ..deferred.report import FusionReport
from ..deferred.settings import settings_of
from .forward import OfModel, is_label, output_embeddings, patched_forward, process_wide, recorder_of


def patch_model(
    model: nn.Module,
    *,
    ignore_index: int | Collection[int] | None = None,
    memory_budget: int | str | None = None,
    without_labels: bool | None = None,
    return_stats: bool = False,
    keep_logits: bool = False,
    **loss_options: Any,
) -> nn.Module:
    """Lets losses of a transformers model be taken from hidden states and head, in its forward or afterwards.

    Equivalent to the same model with `F.cross_entropy(logits, labels, ...)` replaced by
    `fused_linear_cross_entropy(hidden, head.weight, labels, ...)`: loss and gradients are the same. This is
    `defer_logits` of the model's head, and what the forwards of transformers need beside it.

    Args:
        model: a `PreTrainedModel`, or a module that holds one (PEFT, DDP, torch.compile's). Changed in place.
        ignore_index: an id or a collection of ids to ignore, beside those that the model ignores (-100).
        memory_budget: bytes of scratch, an int or a string such as "512MiB", as in `fused_linear_cross_entropy`.
        without_labels: not needed any more: the logits of every forward with gradients are deferred, with labels or
            without. Giving it is a DeprecationWarning.
        return_stats: `outputs.loss_stats` is then the `LossStats` of the loss that the forward took.
        keep_logits: compute logits that somebody still holds when an optimizer steps. Without it, they cannot be read
            after the step, since the head has changed.
        loss_options: weight, label_smoothing, softcap, logit_scale, z_loss, zero_if_all_ignored, logits_dtype, backend,
            as in `fused_linear_cross_entropy`; they apply to every cross entropy over the head's classes, in the
            forward and after it.

    Returns:
        model. `outputs.logits` is a `DeferredLogits`: computed when it is read.

    Raises:
        TypeError: no transformers model; a misspelled option.
        ValueError, RuntimeError: a model without a head; an option out of its range. In a forward: RuntimeError where
            the model takes no cross entropy that the given options could apply to, and where it is called without
            labels, with options, and its head is no matrix product. ValueError where `ignore_index` ignores a token of
            a loss that is asked for as a sum, whose divisor somebody else counts (`num_items_in_batch`):
            `IgnoreTokens` is what to do. In a backward: RuntimeError where a loss was taken of the logits by other
            means than a cross entropy, which the options did not reach.

    Note:
        Generation, and other forwards without labels and gradients, run the model's own code. Patching again replaces
        the options. A model that was saved and loaded again is not patched.
    """
    _needless(without_labels)
    settings = settings_of("patch_model", ignore_index, memory_budget, return_stats, loss_options, keep_logits)
    models = _transformers_models(model)
    heads = [output_embeddings(inner) for inner in models]
    if heads.count(None) == len(heads) and not any(map(_takes_labels, models)):
        raise ValueError(
            f"model: expected a model with a head, whose loss can be taken, got {type(models[0]).__name__}, which has "
            "no output embeddings and whose forward takes no labels; patch the model around it (...ForCausalLM, say)"
        )
    for inner, head in zip(models, heads, strict=True):
        replace_class(inner, _of_model)
        inner.__dict__[PATCH] = patch = Patch(settings)
        if head is not None:
            make_head(head, patch)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes `patch_model`, bit for bit; without effect on a model that is not patched. Returns model."""
    patches = [inner.__dict__[PATCH] for inner in _transformers_models(model) if PATCH in inner.__dict__]
    origins = {patch.origin for patch in patches}
    for module in model.modules():
        if PATCH not in module.__dict__ or module.__dict__[PATCH].origin in origins:
            unmake(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """The report on a model's logits since it was patched: the losses that were fused, and what read the logits.

    Args:
        model: a patched model, a model whose head was given to `defer_logits`, or a module that holds one.

    Returns:
        A `FusionReport`, which prints as a table.

    Raises:
        TypeError: neither a transformers model nor one with a head that defers.

    Note:
        Counting does not wait for the device; this function does.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    recorders = [m.__dict__[PATCH].recorder for m in modules if PATCH in m.__dict__]
    recorders = recorders or [recorder_of(inner) for inner in _transformers_models(model)]
    reports = [recorder.report() for recorder in dict.fromkeys(recorders)]
    total: FusionReport = reports[0]
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
        without_labels: bool | None = None,
        return_stats: bool = False,
        keep_logits: bool = False,
        **loss_options: Any,
    ) -> None:
        _needless(without_labels)
        self._before = process_wide.settings
        process_wide.set(
            settings_of("patch_transformers", ignore_index, memory_budget, return_stats, loss_options, keep_logits)
        )
        _patch_classes()

    def __enter__(self) -> patch_transformers:
        return self

    def __exit__(self, *exc: object) -> None:
        unpatch_transformers()
        if self._before is not None:
            process_wide.set(self._before)
            _patch_classes()


def unpatch_transformers() -> None:
    """Undoes `patch_transformers`; models patched by `patch_model` stay patched."""
    process_wide.set(None)
    while _PATCHED_CLASSES:
        cls, name, original = _PATCHED_CLASSES.pop()
        if original is None:
            delattr(cls, name)
        else:
            setattr(cls, name, original)


def _needless(without_labels: Any) -> None:
    if without_labels is not None:
        check_flag("without_labels", without_labels)
        warnings.warn(
            "without_labels: leave it out; logits of all forwards with gradients are deferred, with labels or without",
            DeprecationWarning,
            stacklevel=3,
        )


def _transformers_models(model: Any) -> list[Any]:
    """The outermost transformers model, and those inside it that take labels, as some models hand their labels on."""
    base = needed("transformers", "hf").PreTrainedModel
    modules = model.modules() if isinstance(model, nn.Module) else ()
    models = [module for module in modules if isinstance(module, base)]
    if not models:
        got, hint = type(model).__name__, ""
        if isinstance(model, type):
            got, hint = f"the class {model.__name__}", "; pass an instance, or call patch_transformers()"
        elif isinstance(getattr(model, "model", None), base):
            hint = "; pass its .model"
        raise TypeError(f"model: expected a transformers PreTrainedModel or a module that holds one, got {got}{hint}")
    return models[:1] + [m for m in models[1:] if _takes_labels(m)]


def _takes_labels(model: nn.Module) -> bool:
    return any(map(is_label, inspect.signature(model.forward).parameters))


def _of_model(cls: Any) -> dict[str, Any]:
    """What the class of a patched model has instead of its own."""
    return with_forward(patched_forward(cls.forward), _kept_forward)


def _kept_forward(model: Any, forward: Any) -> Any:
    """What is set on a model in place of a forward of other code (accelerate, TRL). A compiled one stays as it is."""
    if hasattr(forward, "_torchdynamo_orig_callable"):
        return forward
    if getattr(forward, "__self__", None) is not model:
        return OfModel(model, forward)
    patched = patched_forward(forward.__func__)
    setattr(patched, REPLACED, forward.__func__)
    return MethodType(patched, model)


#: (class, attribute, what it was; None if it was inherited)
_PATCHED_CLASSES: list[tuple[type, str, Any]] = []


def _patch_classes() -> None:
    """Patches forward in all classes of models there are, and in those that will be defined."""
    PreTrainedModel = needed("transformers", "hf").PreTrainedModel
    if _PATCHED_CLASSES:
        return
    define = PreTrainedModel.__dict__.get("__init_subclass__")

    def init_subclass(cls: type, /, **kwargs: Any) -> None:
        if define is not None:
            define.__func__(cls, **kwargs)
        else:
            super(PreTrainedModel, cls).__init_subclass__(**kwargs)
        _patch_class(cls)

    if define is not None:
        _PATCHED_CLASSES.append((PreTrainedModel, "__init_subclass__", define))
        PreTrainedModel.__init_subclass__ = classmethod(init_subclass)
    classes = [PreTrainedModel]
    for cls in classes:
        classes += cls.__subclasses__()
        _patch_class(cls)


def _patch_class(cls: Any) -> None:
    from transformers import PreTrainedModel

    if REPLACED in cls.__dict__:
        return
    owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    if owner is cls or (not issubclass(owner, PreTrainedModel) and owner is not nn.Module):  # its own, or a mixin's
        _PATCHED_CLASSES.append((cls, "forward", cls.__dict__.get("forward")))
        cls.forward = patched_forward(owner.__dict__["forward"])
