"""Modules of which the class is replaced by one with another forward.

The forward belongs to the class, so that it gets the module from the call: copies, replicas and unpickled modules run
their own. A forward that other code sets on the instance is kept in an object that is called in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

#: Where a replaced class keeps the one that it stands for.
REPLACED = "_fused_ignore_ce_of"


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


class SetForward:
    """A forward that other code (accelerate, TRL) has set on a module. A copy of it belongs to the module's copy."""

    __wrapped__: Any

    def __init__(self, module: nn.Module, theirs: Any) -> None:
        functools.update_wrapper(self, theirs, updated=())
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def with_forward(forward: Callable[..., Any], keep: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """The attributes of a class with this forward. For one that other code sets, `keep(instance, forward)` is set."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "forward" and getattr(value, "__func__", None) is not forward and not _is_kept(value, self):
            value = keep(self, value)
        super(own_class(self), self).__setattr__(name, value)

    return {"forward": forward, "__setattr__": __setattr__}


def _is_kept(forward: Any, module: nn.Module) -> bool:
    return isinstance(forward, SetForward) and forward.module is module


def replace_class(module: nn.Module, of: Callable[[Any], dict[str, Any]]) -> None:
    """Gives a module a replaced class, unless it has one."""
    cls: Any = type(module)
    if not hasattr(cls, REPLACED):
        module.__class__ = replaced_class(cls, of)
        if "forward" in module.__dict__:
            module.forward = module.__dict__["forward"]


def forward_of(module: Any) -> Any:
    """A module's forward as it would be with its own class; where other code has set one, that."""
    forward = module.forward
    if isinstance(forward, SetForward):
        return forward.__wrapped__
    return MethodType(getattr(forward, REPLACED), module) if hasattr(forward, REPLACED) else forward


def restore_class(module: nn.Module) -> None:
    """Gives a module its own class again, and the forward that other code has set."""
    if "forward" in module.__dict__:
        module.__dict__["forward"] = forward_of(module)
    cls: Any = type(module)
    if REPLACED in cls.__dict__:
        module.__class__ = cls.__dict__[REPLACED]
