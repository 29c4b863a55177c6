"""Decides how a differentiable function of the package is called: directly on plain tensors, or as an operator.

An operator of `torch.library` is what torch.compile, tensor subclasses and dispatch modes can see. Its first call
imports the compiler, and every call pays for the dispatch; plain tensors in eager mode go through an
`autograd.Function` with the same forward and backward.
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_unary

#: The package's name, which is its operators' namespace too. A loader of kernels from a hub imports the package under
#: another name, so that several versions can be in one process. Their operators must not share a namespace.
PACKAGE = __name__.partition(".")[0]


def is_tracing() -> bool:
    """Whether this code is traced, by torch.compile or torch.export.

    While one thread compiles, `torch.compiler.is_compiling` is true in all threads (PyTorch 2.13).
    """
    if not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_dynamo_compiling() or torch._guards.TracingContext.try_get() is not None


def traced_within_callers(cls: type) -> type:
    """A class whose methods torch.compile traces as part of a function that calls them, but does not compile alone.

    It would compile each one by itself where they run after a graph break. The contexts that they enter, which are not
    part of a compiled graph, would be lost then, and a method that gets a function as its argument would be compiled
    for the first one only.
    """
    skip = eval_frame._FrameAction.SKIP
    for value in vars(cls).values():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return cls


def is_plain(x: Tensor) -> bool:
    """Whether x is eager data: not traced, not on the meta device, no tensor subclass, under no dispatch mode."""
    return (
        not is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
    )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def overridden(x: Tensor) -> bool:
    """Whether a loss of x is computed by deferred logits, or by the torch function mode of a patched model.

    Losses of other subclasses of Tensor are computed here: PyTorch would convert every result to their class.
    """
    if not has_torch_function_unary(x) or is_tracing():
        return False
    return type(x) is Tensor or bool(getattr(type(x), "takes_losses", False))


def may_wait(x: Tensor) -> bool:
    """Whether the values of a tensor like x may be looked at, which waits for the device."""
    return is_plain(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Refuses forward mode and `torch.func` transforms, whose derivatives a kernel would lose silently."""
    if is_tracing():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise _not_supported("torch.func transforms", "torch.autograd")
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise _not_supported("forward-mode differentiation", "reverse mode")


def _not_supported(what: str, instead: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what}: not supported by fused_ignore_ce; use {instead}, or F.cross_entropy there. A patched model needs "
        "unpatch_model(model) for it, a head undefer_logits(head)"
    )
