"""Batches of upstream gradients, as `is_grads_batched=True` and `jacobian(vectorize=True)` give them to a backward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def loops_over_batches(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an `autograd.Function`, called once for every gradient of a batch.

    For a batch, its context is one for which `is_batched` holds: it must leave what it read as it was, for the next
    call. With `create_graph=True`, gradients come from operations of PyTorch, which take batches.
    """

    @functools.wraps(backward)
    def looping(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not any(map(_is_batch, gradients)):
            return backward(ctx, *gradients)
        add, remove, level, outside = _current_batch()
        batches = [remove(g, level, 0, 0) if _is_batch(g) else None for g in gradients]
        once = _BatchedContext(ctx)
        found = []
        with outside():
            for i in range(max(len(batch) for batch in batches if batch is not None)):
                one = (g if batch is None else batch[i] for g, batch in zip(gradients, batches, strict=True))
                found.append(looping(once, *one))
        stacked = (None if each[0] is None else torch.stack(each) for each in zip(*found, strict=True))
        return tuple(None if each is None else add(each, 0, level) for each in stacked)

    return looping


def is_batched(ctx: Any) -> bool:
    return isinstance(ctx, _BatchedContext)


def _is_batch(gradient: Any) -> bool:
    functorch: Any = torch._C._functorch
    return isinstance(gradient, Tensor) and (
        functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient)
    )


def _current_batch() -> Any:
    """What makes a batch of a tensor, its inverse, the level, and a context outside of it.

    Of `torch.vmap`, or else of `torch.autograd`.
    """
    functorch: Any = torch._C._functorch
    interpreter = functorch.peek_interpreter_stack()
    if interpreter is not None:
        from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as outside

        return functorch._add_batch_dim, functorch._remove_batch_dim, interpreter.level(), outside
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return torch._add_batch_dim, torch._remove_batch_dim, level, contextlib.nullcontext


class _BatchedContext:
    """A context whose saved tensors are read once, see `CrossEntropyRows`."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)
