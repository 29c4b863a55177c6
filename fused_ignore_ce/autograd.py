"""Row losses with their gradients: the autograd.Function, and the operators that torch.compile sees.

Both call the same two functions, `_forward` and `_backward`. Eager calls on plain tensors go through the
Function, which spares the operators' dispatch; everything that must be traced goes through the operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, torch_backend


class RowOptions(NamedTuple):
    """The scalar options of a row's loss, in the operators' order."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    z_loss: float


def implementation(backend: str, device: torch.device) -> Any:
    """The module whose `forward` and `backward` run on this device. Called when they run, never while tracing."""
    if backend == "torch":
        return torch_backend
    try:
        from .kernels import cross_entropy
    except ImportError as error:
        raise RuntimeError(
            f'backend="triton" for tensors on {device} needs Triton, which cannot be imported ({error}): install it, '
            f'or pass backend="torch"'
        ) from error
    if device.type == "cpu" and not cross_entropy.interpreted():
        raise RuntimeError(
            'backend="triton" on a CPU tensor runs in Triton\'s interpreter only: set TRITON_INTERPRET=1 before '
            'fused_ignore_ce is first used, or pass backend="torch"'
        )
    if device.type not in ("cuda", "cpu"):
        raise RuntimeError(f'backend="triton" expects CUDA tensors, got one on {device}; pass backend="torch"')
    return cross_entropy


def _forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    options: RowOptions,
    with_stats: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, mass, correct, entropy, target_weight, place); the last two are empty without a group."""
    kernels = implementation(backend, x.device)
    if group is not None:
        from . import distributed

        return distributed.forward(kernels, group, x, target, weight, probs, options._asdict(), with_stats)
    if probs is None:
        torch_backend.check_targets(target, options.ignore_index, x.shape[-1])
    rows = kernels.forward(x, target, weight, probs, **options._asdict(), with_stats=with_stats)
    return *rows, rows[0].new_empty(0), torch.empty(0, dtype=torch.int64)


def _backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    place: Tensor,
    options: RowOptions,
    dx: Tensor | None,
    dprobs: Tensor | None,
    backend: str,
) -> None:
    backward = implementation(backend, x.device).backward
    first_class, classes = place.tolist() or (0, None)
    backward(
        dloss, x, target, weight, probs, lse, mass, **options._asdict(), dx=dx, dprobs=dprobs,
        first_class=first_class, classes=classes,
    )  # fmt: skip


def empty_rows(x: Tensor, N: int, with_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, mass, correct, entropy) of N rows, for fake kernels: nothing is in them."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = N if with_stats else 0
    return (
        x.new_empty(N, dtype=dtype),
        x.new_empty((2, N), dtype=dtype),
        x.new_empty(N, dtype=dtype),
        x.new_empty(stats, dtype=torch.bool),
        x.new_empty(stats, dtype=dtype),
    )


def empty_sharded(
    loss: Tensor, group: str | None, weight: Tensor | None, probs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(target_weight, place), for fake kernels."""
    has_weight = group is not None and weight is not None and probs is None
    place = torch.empty(0 if group is None else 2, dtype=torch.int64, device="cpu")
    return torch.empty_like(loss) if has_weight else loss.new_empty(0), place


@torch.library.custom_op("fused_ignore_ce::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    with_stats: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, mass, correct, entropy, target_weight, place) of x (B, T, V); target is (B * T,) int64.

    With a `group`, by name, x is its rank's shard of the vocabulary. `target_weight` are the class weights of the
    targets, which may be other ranks'; `place` is (first class of the shard, classes of the vocabulary).
    """
    options = RowOptions(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    return _forward(x, target, weight, probs, options, with_stats, backend, group)


@cross_entropy_forward.register_fake
def _(x, target, weight, probs, ignore_index, label_smoothing, softcap, logit_scale, z_loss, with_stats, backend,
      group):  # fmt: skip
    rows = empty_rows(x, x.shape[0] * x.shape[1], with_stats)
    return *rows, *empty_sharded(rows[0], group, weight, probs)


@torch.library.custom_op("fused_ignore_ce::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    place: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    need_dx: bool,
    need_dprobs: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dprobs); one that is not needed is empty."""
    options = RowOptions(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dprobs = torch.empty_like(probs) if need_dprobs and probs is not None else x.new_empty(0)
    _backward(
        dloss, x, target, weight, probs, lse, mass, place, options, dx if need_dx else None,
        dprobs if need_dprobs else None, backend,
    )  # fmt: skip
    return dx, dprobs


@cross_entropy_backward.register_fake
def _(dloss, x, target, weight, probs, lse, mass, place, ignore_index, label_smoothing, softcap, logit_scale, z_loss,
      need_dx, need_dprobs, backend):  # fmt: skip
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    return dx, torch.empty_like(probs) if need_dprobs else x.new_empty(0)


def _save_operator_inputs(ctx, inputs, output) -> None:
    x, target, weight, probs, *options, _with_stats, backend, _group = inputs
    _, lse, mass, correct, entropy, target_weight, place = output
    ctx.save_for_backward(x, target, weight, probs, lse, mass, place)
    ctx.options, ctx.backend = RowOptions(*options), backend
    ctx.mark_non_differentiable(lse, mass, correct, entropy, target_weight, place)
    ctx.set_materialize_grads(False)


def _operator_backward(ctx, dloss, *_):
    dx = dprobs = None
    if dloss is not None:
        need_dx, _, _, need_dprobs, *_ = ctx.needs_input_grad
        gradients = cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options, need_dx, need_dprobs, ctx.backend)
        dx, dprobs = gradients[0] if need_dx else None, gradients[1] if need_dprobs else None
    return dx, None, None, dprobs, *[None] * (len(RowOptions._fields) + 3)


cross_entropy_forward.register_autograd(_operator_backward, setup_context=_save_operator_inputs)


class CrossEntropyRows(torch.autograd.Function):
    """(loss, lse, correct, entropy, target_weight) per row; the loss is differentiable, in x and in probabilities."""

    @staticmethod
    def forward(ctx, x, probs, target, weight, options, with_stats, backend, group, inplace_backward):
        loss, lse, mass, correct, entropy, target_weight, place = _forward(
            x, target, weight, probs, options, with_stats, backend, group
        )
        ctx.save_for_backward(x, target, weight, probs, lse, mass, place)
        ctx.options, ctx.backend, ctx.inplace_backward = options, backend, inplace_backward
        ctx.mark_non_differentiable(lse, correct, entropy, target_weight)
        ctx.set_materialize_grads(False)
        return loss, lse, correct, entropy, target_weight

    @staticmethod
    def backward(ctx, dloss, *_):
        dx = dprobs = None
        need_dx, need_dprobs, *_ = ctx.needs_input_grad
        if dloss is not None:
            # Asked for once: activation checkpointing recomputes them for the first access only.
            x, target, weight, probs, lse, mass, place = ctx.saved_tensors
            if torch.is_grad_enabled():  # create_graph=True
                if len(place):
                    raise NotImplementedError(
                        "create_graph=True is not supported with a sharded vocabulary: gather the logits first, and "
                        "pass process_group=None"
                    )
                dx, dprobs = _differentiable_backward(
                    dloss, x, target, weight, probs, ctx.options, need_dx, need_dprobs
                )
            else:
                if need_dx:
                    dx = x.detach() if ctx.inplace_backward else torch.empty_like(x)
                if need_dprobs:
                    dprobs = torch.empty_like(probs)
                _backward(dloss, x, target, weight, probs, lse, mass, place, ctx.options, dx, dprobs, ctx.backend)
                if need_dx and ctx.inplace_backward:
                    torch.autograd.graph.increment_version(x)
        return dx, dprobs, *[None] * 7


def _differentiable_backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    options: RowOptions,
    need_dx: bool,
    need_dprobs: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dprobs) with a graph of their own, from the reference; it holds several tensors of x's shape."""
    acc = x.double() if x.dtype == torch.float64 else x.float()
    loss = reference.rows(acc, target.view(x.shape[:2]), weight, probs, **options._asdict()).loss
    wanted = [t for t, needed in ((x, need_dx), (probs, need_dprobs)) if needed and t is not None]
    gradients = list(torch.autograd.grad(loss.flatten(), wanted, dloss, create_graph=True))
    return gradients.pop(0) if need_dx else None, gradients.pop(0) if need_dprobs else None


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Reverse mode only: other transforms would be slow here or, in a kernel, lose their derivative silently."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "torch.func transforms are not supported by fused_ignore_ce: use torch.autograd, or F.cross_entropy there"
        )
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(
            "forward-mode differentiation is not supported by fused_ignore_ce: use reverse mode, or F.cross_entropy"
        )


def is_plain(x: Tensor) -> bool:
    """Whether x is eager data: no tracing, no subclass, no dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def cross_entropy_rows(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    options: RowOptions,
    *,
    with_stats: bool,
    inplace_backward: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, correct, entropy, target_weight) of the rows of x (B, T, V), each (B * T,) but lse, (2, B * T).

    `target` is (B * T,) int64 and contiguous. `lse` is the unevaluated sum max + log(sum(exp(x - max))).
    `correct` and `entropy` are empty unless `with_stats`, `target_weight` unless there is a group.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms(x, probs)
    call = (options, with_stats, backend, group)
    if is_plain(x) and torch.is_grad_enabled() and (x.requires_grad or (probs is not None and probs.requires_grad)):
        return CrossEntropyRows.apply(x, probs, target, weight, *call, inplace_backward)
    if is_plain(x):
        rows = _forward(x, target, weight, probs, *call)
    else:
        rows = cross_entropy_forward(x, target, weight, probs, *options, *call[1:])
    loss, lse, _, correct, entropy, target_weight, _ = rows
    return loss, lse, correct, entropy, target_weight
