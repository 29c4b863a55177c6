"""Heads of models whose product is deferred: modules of which the class is replaced by one with another forward.

The forward belongs to the class, so that it gets the module from the call: copies, replicas and unpickled modules defer
their own product. Wrappers that replace `forward` on the instance call it like any other.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .logits import InHead, defer
from .mode import LossMode, can_defer
from .origin import Origin, Settings
from .report import Recorder
from .sharded import defer_sharded, is_sharded

#: Where a module keeps its patch, and where a replaced class keeps the one that it stands for.
PATCH, REPLACED = "_fused_ignore_ce", "_fused_ignore_ce_of"


class Patch:
    """What a model or a head was patched with. A copy counts for itself."""

    def __init__(self, settings: Settings, recorder: Recorder | None = None) -> None:
        self.settings = settings
        self.recorder = recorder or Recorder()
        #: Whether the last forward deferred the product of the head that the model says it has; None before the first.
        self.head_defers: bool | None = None
        #: Whether a warning said that other code takes the model's loss.
        self.has_warned = False

    def __reduce__(self) -> Any:
        return Patch, (self.settings,)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


class _Running(threading.local):
    """The patched forwards that run in this thread, from the outermost, and whether a head does."""

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, Patch, Origin]] = []
        self.is_in_head = False


running = _Running()


@contextlib.contextmanager
def while_running(model: nn.Module, patch: Patch, origin: Origin) -> Iterator[None]:
    running.forwards.append((model, patch, origin))
    origin.in_forward = True
    try:
        yield
    finally:
        origin.in_forward = False
        running.forwards.pop()


def origin_of(head: nn.Module) -> Origin | None:
    """What logits of a head belong to: the forward that its model is running, or a new one; None to compute them."""
    patch = head.__dict__.get(PATCH)
    for _, running_patch, origin in reversed(running.forwards):
        if patch is None or patch is running_patch:
            return origin
    return Origin(patch.settings, patch.recorder) if patch is not None and torch.is_grad_enabled() else None


def _deferring(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a head, given its own."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if len(args) > 1 and isinstance(args[-1], InHead):
            return args[-1].compute()
        origin = None if running.is_in_head else origin_of(self)
        if origin is None:
            return original(self, *args, **kwargs)
        if original is not nn.Linear.forward:
            return _deferred_inside(self, original, origin, args, kwargs)
        (hidden,) = (*args, *kwargs.values())
        if is_sharded(hidden, self.weight, self.bias):
            origin.head_deferred = True
            return defer_sharded(hidden, self.weight, self.bias, origin, self)
        if not can_defer(hidden, self.weight, self.bias):
            return original(self, *args, **kwargs)
        origin.head_deferred = True
        return defer(hidden, self.weight, self.bias, origin, self)

    return forward


def _deferred_inside(head: Any, original: Any, origin: Origin, args: Any, kwargs: Any) -> Any:
    """Runs the forward of a head that is no plain linear layer; products of the vocabulary's size are deferred."""
    running.is_in_head = True
    try:
        with LossMode(classes_of(head), origin, head):
            return original(head, *args, **kwargs)
    finally:
        running.is_in_head = False


def classes_of(head: Any) -> int | None:
    """The number of classes of a head, None if it does not tell."""
    weight = getattr(head, "weight", None)
    classes = getattr(head, "out_features", None)
    if classes is None and isinstance(weight, Tensor) and weight.dim() == 2:
        classes = weight.shape[0]
    return classes


@functools.cache
def replaced_class(cls: Any, of: Callable[[Any], dict[str, Any]]) -> Any:
    """A subclass of the same name with the attributes that `of(cls)` gives; instances pickle and copy as such."""
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": functools.partialmethod(_reduce, of),
        REPLACED: cls,
        **of(cls),
    }
    return type(cls)(cls.__name__, (cls,), body)


def own_class(module: Any) -> Any:
    """The replaced class: the module's own, or the base that a sharding wrapper (FSDP2) derived the module's from."""
    return next((cls for cls in type(module).__mro__ if REPLACED in cls.__dict__), None)


def _reduce(self: Any, of: Any, protocol: Any) -> Any:
    cls = own_class(self)
    _, args, *rest = super(cls, self).__reduce_ex__(max(2, protocol))
    return _rebuild, (of, cls.__dict__[REPLACED], *args[1:]), *rest


def _rebuild(of: Any, cls: type, *args: Any) -> Any:
    replaced = replaced_class(cls, of)
    return replaced.__new__(replaced, *args)


def _of_head(cls: Any) -> dict[str, Any]:
    return {"forward": _deferring(cls.forward)}


def make_head(head: nn.Module, patch: Patch | None) -> None:
    """Lets a module defer: with a patch whenever gradients are enabled, else while its model's patched forward runs."""
    if own_class(head) is None:
        head.__class__ = replaced_class(type(head), _of_head)
    if patch is not None:
        head.__dict__[PATCH] = patch


def unmake(module: nn.Module) -> None:
    """Gives a module its own class again."""
    module.__dict__.pop(PATCH, None)
    cls: Any = type(module)
    if REPLACED in cls.__dict__:
        module.__class__ = cls.__dict__[REPLACED]
