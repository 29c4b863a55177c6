"""The linear loss's operators, for eager mode and torch.compile alike.

Where a scalar is asked for, `linear_cross_entropy_sum` computes the gradients along with it, from logits that exist
anyway: three GEMMs. Otherwise `linear_cross_entropy_forward` saves the rows' normalisers, and backward computes the
logits again once the upstream gradients are known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import RowOptions, empty_rows, empty_sharded, is_plain
from ..torch_backend import check_targets
from .plan import LinearPlan, Sizes, choose
from .sweep import Operands, sweep

#: Elements that are scaled at a time where a scale of another dtype would make PyTorch copy the tensor (CPUs).
SCALED_ELEMENTS = 1 << 20


def sizes_of(
    h: Tensor,
    w: Tensor,
    probs: Tensor | None,
    dtype: torch.dtype,
    *,
    dinput: bool,
    dweight: bool,
    gathered: bool,
    recompute: bool,
    group: str | None,
) -> Sizes:
    return Sizes(
        N=h.shape[0],
        V=w.shape[0],
        D=h.shape[1],
        dtype=dtype,
        input_dtype=h.dtype,
        weight_dtype=w.dtype,
        device=h.device.type,
        dinput=dinput,
        dweight=dweight,
        gathered=gathered,
        recompute=recompute,
        probs=probs is not None,
        ranks=1 if group is None else _ranks(group),
    )


def _ranks(group: str) -> int:
    from ..distributed import group_named

    return group_named(group).size()


def _shard(group: str | None, h: Tensor, w: Tensor, target: Tensor, probs: Tensor | None, *call: Any) -> Any:
    """The ranks agree, or the targets are checked where there is no group. `call` begins with the options."""
    ignore_index = call[0].ignore_index
    if group is not None:
        from .. import distributed

        call = (h.dtype, h.shape[1], probs is None, *call)
        return distributed.agree(group, w.shape[0], target if probs is None else None, ignore_index, len(target), call)
    if probs is None:
        check_targets(target, ignore_index, w.shape[0])
    return None


def _shard_at(group: str, place: Tensor) -> Any:
    from ..distributed import Shard, group_named

    return Shard(group_named(group), *place.tolist())


def _run(operands: Operands, options: RowOptions, plan: LinearPlan, dtype: torch.dtype, backend: str, **kwargs):
    # Operands have their dtypes already; autocast would cast what is summed in float32.
    with torch.autocast(operands.h.device.type, enabled=False):
        return sweep(operands, options, plan, dtype=dtype, backend=backend, **kwargs)


def _empty_unless(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


@torch.library.custom_op("fused_ignore_ce::linear_cross_entropy_sum", mutates_args=())
def linear_cross_entropy_sum(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    dtype: torch.dtype,
    memory_budget: int | None,
    gathered: bool,
    with_stats: bool,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum(scale * loss), loss, lse, correct, entropy, target_weight, dh, dw, db).

    A gradient that is not needed is empty. With a group, w, b, weight and probs are its rank's shard, and dh the
    shard's share.
    """
    options = RowOptions(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    shard = _shard(group, h, w, target, probs, options, with_stats, weight is None)
    sizes = sizes_of(
        h, w, probs, dtype, dinput=need_dh, dweight=need_dw, gathered=gathered, recompute=False, group=group
    )
    rows, gradients = _run(
        Operands(h, w, b, target, weight, probs),
        options,
        choose(sizes, memory_budget),
        dtype,
        backend,
        with_stats=with_stats,
        dloss=scale,
        wanted=(need_dh, need_dw, need_db, False),
        shard=shard,
    )
    total = (rows.loss * scale).sum()
    dh, dw, db = (_empty_unless(gradient, h) for gradient in gradients[:3])
    target_weight = rows.loss.new_empty(0) if shard is None else rows.target_weight
    return total, rows.loss, rows.lse, rows.correct, rows.entropy, target_weight, dh, dw, db


@linear_cross_entropy_sum.register_fake
def _(h, w, b, target, weight, probs, scale, ignore_index, label_smoothing, softcap, logit_scale, z_loss, dtype,
      memory_budget, gathered, with_stats, need_dh, need_dw, need_db, backend, group):  # fmt: skip
    loss, lse, _, correct, entropy = empty_rows(h, h.shape[0], with_stats)
    target_weight, _ = empty_sharded(loss, group, weight, probs)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dh else h.new_empty(0)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if need_dw else h.new_empty(0)
    db = b.new_empty(b.shape) if need_db else h.new_empty(0)
    return loss.new_empty(()), loss, lse, correct, entropy, target_weight, dh, dw, db


def _save_sum(ctx, inputs, output) -> None:
    _, loss, lse, correct, entropy, target_weight, dh, dw, db = output
    ctx.save_for_backward(loss, dh, dw, db)
    ctx.mark_non_differentiable(loss, lse, correct, entropy, target_weight, dh, dw, db)
    ctx.set_materialize_grads(False)


def _sum_backward(ctx, dtotal, *_):
    dh = dw = db = dscale = None
    if dtotal is not None:
        _refuse_create_graph()
        loss, *gradients = ctx.saved_tensors  # asked for once, see CrossEntropyRows
        need_dh, need_dw, need_db, _, _, _, need_dscale, *_ = ctx.needs_input_grad
        needed = (need_dh, need_dw, need_db)
        dh, dw, db = (_scaled(g, dtotal) if need else None for g, need in zip(gradients, needed, strict=True))
        dscale = loss * dtotal if need_dscale else None
    return dh, dw, db, None, None, None, dscale, *[None] * 14


linear_cross_entropy_sum.register_autograd(_sum_backward, setup_context=_save_sum)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, computed in the wider dtype; over the gradient itself where nobody will ask for it again."""
    if not is_plain(gradient):
        return (gradient * factor.reshape(1)).to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        out = torch.empty_like(gradient)
    elif factor.device.type == "cpu" and factor.item() == 1.0:
        return gradient
    else:
        out = gradient
    factor = factor.reshape(1)  # with a dimension it takes part in type promotion: it is not rounded to bfloat16
    if gradient.device.type != "cpu" or gradient.dtype == factor.dtype:
        return torch.mul(gradient, factor, out=out)
    for part, part_out in zip(
        gradient.view(-1).split(SCALED_ELEMENTS), out.view(-1).split(SCALED_ELEMENTS), strict=True
    ):
        torch.mul(part, factor, out=part_out)
    return out


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True is not supported by fused_linear_cross_entropy; it is by "
            "fused_cross_entropy(F.linear(input, linear_weight, linear_bias), target)"
        )


@torch.library.custom_op("fused_ignore_ce::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    dtype: torch.dtype,
    memory_budget: int | None,
    gathered: bool,
    with_stats: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, mass, correct, entropy, target_weight, place) of every row, as `cross_entropy_forward`."""
    options = RowOptions(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    shard = _shard(group, h, w, target, probs, options, with_stats, weight is None)
    sizes = sizes_of(h, w, probs, dtype, dinput=False, dweight=False, gathered=gathered, recompute=False, group=group)
    plan = choose(sizes, memory_budget)
    operands = Operands(h, w, b, target, weight, probs)
    rows, _ = _run(operands, options, plan, dtype, backend, with_stats=with_stats, shard=shard)
    if shard is None:
        return *rows, rows.loss.new_empty(0), torch.empty(0, dtype=torch.int64)
    return *rows, shard.place()


@linear_cross_entropy_forward.register_fake
def _(h, w, b, target, weight, probs, ignore_index, label_smoothing, softcap, logit_scale, z_loss, dtype,
      memory_budget, gathered, with_stats, backend, group):  # fmt: skip
    rows = empty_rows(h, h.shape[0], with_stats)
    return *rows, *empty_sharded(rows[0], group, weight, probs)


@torch.library.custom_op("fused_ignore_ce::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    dloss: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
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
    dtype: torch.dtype,
    memory_budget: int | None,
    gathered: bool,
    need_dh: bool,
    need_dw: bool,
    need_db: bool,
    need_dprobs: bool,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh, dw, db, dprobs); one that is not needed is empty."""
    options = RowOptions(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    sizes = sizes_of(
        h, w, probs, dtype, dinput=need_dh, dweight=need_dw, gathered=gathered, recompute=True, group=group
    )
    _, gradients = _run(
        Operands(h, w, b, target, weight, probs),
        options,
        choose(sizes, memory_budget),
        dtype,
        backend,
        saved=(lse, mass),
        dloss=dloss,
        wanted=(need_dh, need_dw, need_db, need_dprobs),
        shard=None if group is None else _shard_at(group, place),
    )
    dh, dw, db, dprobs = (_empty_unless(gradient, h) for gradient in gradients)
    return dh, dw, db, dprobs


@linear_cross_entropy_backward.register_fake
def _(dloss, h, w, b, target, weight, probs, lse, mass, place, ignore_index, label_smoothing, softcap, logit_scale,
      z_loss, dtype, memory_budget, gathered, need_dh, need_dw, need_db, need_dprobs, backend, group):  # fmt: skip
    def fake(t, needed, memory_format=torch.contiguous_format):
        return torch.empty_like(t, memory_format=memory_format) if needed else h.new_empty(0)

    return fake(h, need_dh), fake(w, need_dw), fake(b, need_db), fake(probs, need_dprobs, torch.preserve_format)


def _save_rows(ctx, inputs, output) -> None:
    h, w, b, target, weight, probs, *options, dtype, memory_budget, gathered, _with_stats, backend, group = inputs
    _, lse, mass, correct, entropy, target_weight, place = output
    ctx.save_for_backward(h, w, b, target, weight, probs, lse, mass, place)
    ctx.options, ctx.call, ctx.run_by = RowOptions(*options), (dtype, memory_budget, gathered), (backend, group)
    ctx.mark_non_differentiable(lse, mass, correct, entropy, target_weight, place)
    ctx.set_materialize_grads(False)


def _rows_backward(ctx, dloss, *_):
    gradients = [None] * 4
    if dloss is not None:
        _refuse_create_graph()
        need_dh, need_dw, need_db, _, _, need_dprobs, *_ = ctx.needs_input_grad
        needed = (need_dh, need_dw, need_db, need_dprobs)
        found = linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options, *ctx.call, *needed, *ctx.run_by)
        gradients = [gradient if need else None for gradient, need in zip(found, needed, strict=True)]
    dh, dw, db, dprobs = gradients
    return dh, dw, db, None, None, dprobs, *[None] * 11


linear_cross_entropy_forward.register_autograd(_rows_backward, setup_context=_save_rows)
