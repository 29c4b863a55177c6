"""The forward of a patched transformers model: it says whose logits a head makes, and what became of its loss."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.eager import PACKAGE, is_tracing
from ..deferred.heads import (
    PATCH,
    Patch,
    classes_of,
    make_head,
    running,
    tracing,
    unmake,
    weight_of,
    while_running,
)
from ..deferred.logits import as_tensor
from ..deferred.mode import LossMode
from ..deferred.replaced import SetForward
from ..deferred.report import COMPILED, Recorder
from ..deferred.settings import Settings
from ..deferred.shared_state import SharedState
from ..deferred.traced import TracedLogits


class _ProcessWide:
    def __init__(self) -> None:
        #: The settings of `patch_transformers`, for models that were not patched themselves; None while it is off.
        self.settings: Settings | None = None
        #: The patches of those models, and the heads that were made to defer for them.
        self.patches: weakref.WeakKeyDictionary[nn.Module, Patch] = weakref.WeakKeyDictionary()
        self.heads: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._lock = threading.RLock()

    def set(self, settings: Settings | None) -> None:
        with self._lock:
            self.settings = settings
            patches = ((m, Patch(p.settings, p.recorder)) for m, p in self.patches.items())
            self.patches = weakref.WeakKeyDictionary(patches)
            for head in list(self.heads) if settings is None else []:
                if PATCH not in head.__dict__:
                    unmake(head)

    def patch_of(self, model: nn.Module, settings: Settings) -> Patch:
        with self._lock:
            patch = self.patches.get(model)
            if patch is None or patch.settings is not settings:
                patch = self.patches[model] = Patch(settings, None if patch is None else patch.recorder)
            return patch

    def add_head(self, head: nn.Module) -> None:
        with self._lock:
            self.heads.add(head)


process_wide = _ProcessWide()


def recorder_of(model: nn.Module, fresh: bool = False) -> Recorder:
    """The recorder of a model; a new one on the first call, or if it is to be `fresh`."""
    patch = model.__dict__.get(PATCH) or process_wide.patches.get(model)
    patch = patch or process_wide.patch_of(model, process_wide.settings or Settings())
    if fresh:
        patch.recorder = Recorder()
    return patch.recorder


def patched_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    names = _names_of(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, functools.partial(original, self), names, args, kwargs)

    return forward


class OfModel(SetForward):
    """A forward that other code has set on a model."""

    def __init__(self, module: nn.Module, theirs: Any) -> None:
        super().__init__(module, theirs)
        self.names = _names_of(theirs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.module, self.__wrapped__, self.names, args, kwargs)


def _names_of(forward: Any) -> tuple[str, ...]:
    names = tuple(inspect.signature(forward).parameters)
    return names[1:] if names[:1] == ("self",) else names


def _run(model: Any, original: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs `original`, the forward of a model whose arguments have these names."""
    patch = model.__dict__.get(PATCH)
    settings = process_wide.settings
    if patch is None and settings is not None:
        patch = process_wide.patch_of(model, settings)
    if patch is None:
        return original(*args, **kwargs)
    labels = _has_labels((*zip(names, args, strict=False), *kwargs.items()))
    if not labels and not (torch.is_grad_enabled() and _is_outermost()):
        return original(*args, **kwargs)
    if is_tracing():
        shared = SharedState(patch.settings)
        shared.in_forward = True
        _spare(kwargs, shared)
        tracing.models += 1
        try:
            with LossMode(classes_of(output_embeddings(model)), shared):
                outputs = original(*args, **kwargs)
        finally:
            tracing.models -= 1
        if labels and not shared.used and _is_outermost():
            _check_traced(model, original, outputs)
        return _as_tensors(outputs, model, shared)
    if any(model is each for each, _, _ in running.forwards):  # a subclass's forward, or the instance's, calls this
        return original(*args, **kwargs)
    shared = SharedState(patch.settings, patch.recorder)
    _spare(kwargs, shared)
    head = output_embeddings(model)
    if head is not None:
        make_head(head, None)
        if PATCH not in model.__dict__:
            process_wide.add_head(head)
    watched = None
    if head is None or not patch.head_defers.get(labels):
        watched = LossMode(classes_of(head), shared, weights=_weights(model, head))
    with while_running(model, patch, shared), watched or contextlib.nullcontext():
        outputs = original(*args, **kwargs)
    patch.head_defers[labels] = shared.head_deferred and (shared.fused or not labels)
    _check_taken(model, patch, shared, labels, original, outputs)
    for _, _, outer in running.forwards:
        outer.used = outer.used or shared.used
    return _with_stats(outputs, shared.stats)


def _spare(kwargs: dict[str, Any], shared: SharedState) -> None:
    """With zero_if_all_ignored, gives the forward a copy of `num_items_in_batch`, which its loss may write to."""
    count = kwargs.get("num_items_in_batch")
    may_be_zero = count is not None and (isinstance(count, Tensor) or count == 0)
    if may_be_zero and shared.settings.options.get("zero_if_all_ignored"):
        kwargs["num_items_in_batch"] = shared.divisor = torch.as_tensor(count).clone()


def _is_outermost() -> bool:
    return not (tracing.models if is_tracing() else running.forwards)


def _check_taken(model: Any, patch: Patch, shared: SharedState, labels: bool, original: Any, outputs: Any) -> None:
    """Raises an error, or warns, if a loss did not get the options, or could not be fused."""
    given = shared.settings.changes
    # The labels that a model hands on to the one inside it, which only prepares them or returns hidden states, are used
    # outside of that.
    takes_loss = not running.forwards or _loss_in(outputs) is not None
    if labels and given and not shared.used and takes_loss:
        raise RuntimeError(
            f"{given}: given to patch_model, but the forward of {type(model).__name__} took no cross entropy over the "
            "head's classes that could use it; unpatch_model(model) and give it to the loss yourself"
        )
    if not labels and given and not shared.deferred:
        raise RuntimeError(
            f"{given}: given to patch_model, but {type(model).__name__} is trained without labels: its loss is taken "
            "after the forward (as by Trainer's label_smoothing_factor and compute_loss_func) of logits that do not "
            "know of these options, as where its head is no matrix product; patch without them and give them to the "
            "loss yourself"
        )
    if not labels or shared.fused or running.forwards:
        return
    if not shared.why_not:
        shared.was_not_fused(_reason(model, shared, original, outputs))
    if shared.why_not not in patch.warned:
        patch.warned.add(shared.why_not)
        warnings.warn(
            f"model: {type(model).__name__} is patched by fused_ignore_ce and was given labels, but nothing was fused: "
            f"{shared.why_not}",
            stacklevel=4,
        )


def _reason(model: Any, shared: SharedState, forward: Any, outputs: Any) -> str:
    """Why nothing was fused in a forward that was given labels."""
    read = f"its logits were computed for {shared.reader}" * shared.read
    if shared.used:
        return read or "its loss was taken of logits that its output embeddings did not make"
    name = _name_of(forward)
    return (
        f"{read}{', and ' * bool(read)}its loss was taken by {name}{_python_function(_loss_in(outputs))}, not by a "
        "cross entropy over logits that this package could compute. Undo what replaced the model's forward, if "
        "something did, or call unpatch_model(model)"
        + "; for a trainer of TRL, fused_ignore_ce.trl.patch_trainer(trainer) fuses it"
        * name.startswith("trl.")
    )


def _loss_in(outputs: Any) -> Any:
    """The loss that a forward returned, None if there is none or it has no name."""
    return outputs.get("loss") if isinstance(outputs, dict) else None


def _name_of(forward: Any) -> str:
    """Module and name of the code that runs as a model's forward, without transformers' own decorators."""
    forward = getattr(forward, "func", forward)  # of a partial
    while getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers.utils"):
        forward = forward.__wrapped__
    forward = getattr(forward, "__func__", forward)
    code = getattr(forward, "__code__", None)
    return type(forward).__name__ if code is None else f"{forward.__globals__['__name__']}.{code.co_name}"


def _python_function(loss: Any) -> str:
    """The first autograd.Function written in Python that a loss comes from."""
    nodes = [loss.grad_fn] if isinstance(loss, Tensor) and loss.grad_fn is not None else []
    for node in nodes:
        cls = getattr(node, "_forward_cls", None)
        if cls is not None and not cls.__module__.startswith(PACKAGE):
            return f" ({cls.__module__}.{cls.__name__})"
        if len(nodes) < 50:
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return ""


def state_in(model: nn.Module) -> SharedState:
    """The state of the forward that a model is running; a new one if the model is not patched."""
    found = (shared for each, _, shared in running.forwards if each is model)
    return next(found, None) or SharedState(recorder=recorder_of(model))


def _has_labels(given: Any) -> bool:
    return any(is_label(name) and value is not None and value is not False for name, value in given)


def is_label(name: str) -> bool:
    """Whether a forward's argument of this name asks for a loss."""
    return "label" in name or name in ("start_positions", "end_positions")


def output_embeddings(model: Any) -> nn.Module | None:
    """The output embeddings of the model, or else those of a model inside it."""
    head = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        return head._modules.get("_orig_mod", head)  # what torch.compile was given
    from transformers.modeling_utils import PreTrainedModel  # Dynamo of PyTorch 2.11 cannot trace a lazy module

    inner = (output_embeddings(child) for child in model.children() if isinstance(child, PreTrainedModel))
    return next((found for found in inner if found is not None), None)


def _weights(model: Any, head: Any) -> list[Any] | None:
    """The weights of the head and of the input embeddings, with which it may be tied; None where any may be the head's.

    FSMT names an embedding as its head, and multiplies with a layer that it does not name.
    """
    if isinstance(head, nn.Embedding):
        return None
    with contextlib.suppress(NotImplementedError, AttributeError):
        return [weight_of(head), weight_of(model.get_input_embeddings())]
    return [weight_of(head)]


def _with_stats(outputs: Any, stats: Any) -> Any:
    if stats is not None:
        if not isinstance(outputs, dict):
            got = type(outputs).__name__
            raise ValueError(f"return_stats: expected a forward with a ModelOutput, got {got}; pass return_dict=True")
        object.__setattr__(outputs, "loss_stats", stats)
    return outputs


def _as_tensors(outputs: Any, model: nn.Module, shared: SharedState) -> Any:
    """Turns traced logits into tensors. This happens outside of the graph, which cannot make them."""
    values = outputs.values() if isinstance(outputs, dict) else outputs
    traced = not isinstance(values, Tensor) and any(isinstance(v, TracedLogits) for v in values)
    if not traced and shared.stats is None:
        return outputs
    for value in values:
        if isinstance(value, TracedLogits):
            value.alone()
    return _outside(outputs, model, shared.settings, shared.used, shared.stats)


@torch.compiler.disable
def _check_traced(model: nn.Module, original: Any, outputs: Any) -> None:
    patch = model.__dict__.get(PATCH) or process_wide.patch_of(model, process_wide.settings or Settings())
    _check_taken(model, patch, SharedState(patch.settings, patch.recorder), True, original, outputs)


@torch.compiler.disable(reason="a patched model breaks the graph once, at its end: compile it without fullgraph=True")
def _outside(outputs: Any, model: nn.Module, settings: Settings, used: bool, stats: Any) -> Any:
    def as_deferred(value: Any) -> Any:
        if not isinstance(value, TracedLogits):
            return value
        if value._stands_alone():
            return value.materialize()
        made = as_tensor(value, SharedState(settings, recorder_of(model)))
        if used:
            made._shared.took(f"cross_entropy {COMPILED}", value._form.product.rows)
        return made

    if not isinstance(outputs, dict):
        return _with_stats(type(outputs)(map(as_deferred, outputs)), stats)
    for name, value in list(outputs.items()):
        outputs[name] = as_deferred(value)
    return _with_stats(outputs, stats)
