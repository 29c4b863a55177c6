"""Heads of models whose product is deferred: modules of which the class is replaced by one with another forward.

A call of a head changes nothing that another thread can see.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.eager import is_tracing
from .head_call import InHead
from .logits import defer
from .mode import LossMode, can_defer
from .replaced import SetForward, replace_class, restore_class, with_forward
from .report import Recorder
from .settings import Settings, settings_of
from .sharded import defer_sharded, is_sharded
from .shared_state import SharedState

#: Where a module keeps its patch.
PATCH = "_fused_ignore_ce"


class Patch:
    """What a model or a head was patched with. A copy has a report of its own."""

    def __init__(self, settings: Settings, recorder: Recorder | None = None) -> None:
        self.settings = settings
        self.recorder = recorder or Recorder()
        #: For forwards with labels and without: whether the head of the last one deferred its product by itself, and a
        #: loss in it was fused. Such a forward is not watched by a `LossMode`.
        self.head_defers: dict[bool, bool] = {}
        #: What warnings have said: why nothing was fused.
        self.warned: set[str] = set()
        #: The same for all copies: the copy of a head, which PEFT puts in its place, belongs to the head's model.
        self.origin = object()

    def __reduce__(self) -> Any:
        return Patch, (self.settings,)

    def __deepcopy__(self, memo: Any) -> Patch:
        copied = Patch(self.settings)
        copied.origin = self.origin
        return copied

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def defer_logits(
    head: nn.Module,
    *,
    ignore_index: int | Collection[int] | None = None,
    memory_budget: int | str | None = None,
    keep_logits: bool = False,
    **loss_options: Any,
) -> nn.Module:
    """Lets the head of any model return logits that are not computed until they are read.

    From then on, what the module returns while gradients are enabled is a `DeferredLogits`. `F.cross_entropy` of it,
    and of what is made of it by casts, scales, reshapes and slices, is `fused_linear_cross_entropy(hidden, head.weight,
    ...)`, wherever it is taken; losses of log-probabilities and entropies are computed a tile of rows at a time.

    Args:
        head: an `nn.Linear`, or a module whose result is a product with its `weight` (V, D), plus an optional `bias`.
            Changed in place.
        ignore_index: an id or a collection of ids to ignore, beside those that a loss is told to ignore.
        memory_budget: bytes of scratch, an int or a string such as "512MiB", as in `fused_linear_cross_entropy`.
        keep_logits: compute logits that somebody still holds when an optimizer steps. Without it, they cannot be read
            after the step, since the head has changed.
        loss_options: weight, label_smoothing, softcap, logit_scale, z_loss, zero_if_all_ignored, logits_dtype, backend,
            as in `fused_linear_cross_entropy`; they apply to every cross entropy that is taken of the logits.

    Returns:
        head.

    Raises:
        TypeError: no module; a misspelled option.
        ValueError, RuntimeError: a module without a weight (V, D); an option out of its range. In a backward:
            RuntimeError where a loss was taken of the logits by other means than a cross entropy, which the options
            did not reach.

    Examples:
        >>> head = defer_logits(nn.Linear(2, 5))
        >>> logits = head(torch.ones(3, 2))
        >>> loss = torch.nn.functional.cross_entropy(logits.view(-1, 5), torch.tensor([0, 1, 4]))
        >>> type(logits).__name__, logits.is_materialized
        ('DeferredLogits', False)
    """
    settings = settings_of("defer_logits", ignore_index, memory_budget, False, loss_options, keep_logits)
    if not isinstance(head, nn.Module):
        raise TypeError(f"head: expected a module, got {type(head).__name__}")
    weight = weight_of(head)
    is_linear = isinstance(_wrapped(head) or head, nn.Linear)  # its weight may be computed whenever it is read
    if not is_linear and (not isinstance(weight, Tensor) or len(_whole_shape(weight)) != 2):
        got = type(weight).__name__ if not isinstance(weight, Tensor) else f"one of shape {tuple(weight.shape)}"
        raise ValueError(f"head: expected a module with a weight (V, D), such as an nn.Linear, got {got}")
    make_head(head, Patch(settings))
    return head


def undefer_logits(head: nn.Module) -> nn.Module:
    """Undoes `defer_logits`; without effect on a module that does not defer. Returns head."""
    unmake(head)
    return head


class _Running(threading.local):
    """The patched forwards that run in this thread, from the outermost, and whether a head does."""

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, Patch, SharedState]] = []
        self.is_in_head = False


running = _Running()


class _Tracing:
    def __init__(self) -> None:
        #: How many forwards of patched models, one inside another, torch.compile is tracing.
        self.models = 0


tracing = _Tracing()


@contextlib.contextmanager
def while_running(model: nn.Module, patch: Patch, shared: SharedState) -> Iterator[None]:
    running.forwards.append((model, patch, shared))
    shared.in_forward = True
    try:
        yield
    finally:
        shared.in_forward = False
        running.forwards.pop()


def state_of(head: nn.Module) -> SharedState | None:
    """What logits of a head belong to: the forward that its model is running, or a new one; None to compute them."""
    patch = head.__dict__.get(PATCH)
    for _, running_patch, shared in reversed(running.forwards):
        if patch is None or patch.origin is running_patch.origin:
            return shared
    return SharedState(patch.settings, patch.recorder) if patch is not None and torch.is_grad_enabled() else None


def _deferring(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that a patched head gets in place of its `original` one."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[-1], InHead):
            return args[-1]() if _wrapped(self) is None else original(self, *args)
        if is_tracing():
            return (original if tracing.models else eager)(self, *args, **kwargs)
        shared = None if running.is_in_head else state_of(self)
        if shared is None:
            return original(self, *args, **kwargs)
        if original is not nn.Linear.forward:
            return _deferred_inside(self, functools.partial(original, self), shared, args, kwargs)
        hidden: Any = (*args, *kwargs.values())[0]
        weight, bias = self.weight, self.bias  # read once: a parametrization computes them
        if is_sharded(hidden, weight, bias):
            shared.head_deferred = True
            return defer_sharded(hidden, weight, bias, shared)
        if not can_defer(hidden, weight, bias):
            shared.was_not_fused(f"its head multiplies {_kind(hidden)} with {_kind(weight)}, which cannot be deferred")
            return torch.nn.functional.linear(hidden, weight, bias)
        shared.head_deferred = True
        return defer(hidden, weight, bias, shared, self)

    eager = torch.compiler.disable(
        forward, reason="a head that defers breaks the graph: compile without fullgraph=True"
    )
    return forward


def _deferred_inside(head: Any, call: Any, shared: SharedState, args: Any, kwargs: Any) -> Any:
    """Runs a head that is no plain linear layer; products of the vocabulary's size are deferred."""
    shared.deferred, before = False, shared.deferred
    running.is_in_head = True
    try:
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with LossMode(classes_of(head), shared, head, ndim=None if hidden is None else hidden.dim()):
            found = call(*args, **kwargs)
    finally:
        running.is_in_head = False
    if not shared.deferred:
        weight = weight_of(head)
        of = f" with a weight of type {type(weight).__name__}" * (
            type(weight) not in (Tensor, nn.Parameter, type(None))
        )
        shared.was_not_fused(f"its head, a {type(head).__name__}{of}, makes no product that can be deferred")
    shared.deferred |= before
    return found


def _kind(t: Any) -> str:
    return f"a {type(t).__name__} of {t.dtype} on {t.device}" if isinstance(t, Tensor) else f"a {type(t).__name__}"


def classes_of(head: Any) -> int | None:
    """The number of classes of a head, or of its last layer that has a weight or `out_features`; None if none has.

    The weight comes first, because PEFT swaps the features of a tied copy of a head.
    """
    weight = weight_of(head)
    if isinstance(weight, Tensor) and weight.is_floating_point() and len(_whole_shape(weight)) == 2:
        return int(_whole_shape(weight)[0])
    classes = getattr(head, "out_features", None)
    layers = reversed(list(head.children())) if classes is None and isinstance(head, nn.Module) else ()
    return next((found for found in map(classes_of, layers) if found is not None), classes)


def weight_of(module: Any) -> Any:
    """The weight of a module; None if it has none, or if its weight is computed whenever it is read.

    A parameter is not read as an attribute: DeepSpeed would gather it for the rest of the model's forward.
    """
    parameters = getattr(module, "_parameters", {})
    if "weight" in parameters or "parametrizations" in getattr(module, "_modules", {}):
        return dict.get(parameters, "weight")
    return getattr(module, "weight", None)


def _whole_shape(weight: Tensor) -> Any:
    """The shape of a weight, also of one that DeepSpeed has partitioned."""
    return getattr(weight, "ds_shape", weight.shape)


class _OfHead(SetForward):
    """A forward that other code has set on a head. It need not call the forward of the head's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        theirs = self.__wrapped__
        if len(args) > 1 and isinstance(args[-1], InHead):
            return args[-1]()
        shared = None if running.is_in_head or is_tracing() else state_of(self.module)
        return (
            theirs(*args, **kwargs) if shared is None else _deferred_inside(self.module, theirs, shared, args, kwargs)
        )


def _wrapped(head: nn.Module) -> nn.Module | None:
    """The head that FSDP1 has wrapped by itself; it passes on what it is called with."""
    return head._modules.get("_fsdp_wrapped_module")


def _of_head(cls: Any) -> dict[str, Any]:
    return with_forward(_deferring(cls.forward), _OfHead)


def make_head(head: nn.Module, patch: Patch | None) -> None:
    """Lets a module defer: with a patch whenever gradients are enabled, else while its model's patched forward runs."""
    replace_class(head, _of_head)
    inner = _wrapped(head)
    if inner is not None:
        make_head(inner, None)
    if patch is not None:
        head.__dict__[PATCH] = patch


def unmake(module: nn.Module) -> None:
    """Gives a module its own class again."""
    module.__dict__.pop(PATCH, None)
    restore_class(module)
