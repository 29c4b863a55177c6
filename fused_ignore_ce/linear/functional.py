"""The public functions of the linear loss: check the arguments, drop the ignored rows, reduce."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..autograd import RowOptions, is_plain, refuse_transforms
from ..reduction import LossStats, divisor, loss_dtype, row_targets
from .autograd import linear_cross_entropy_forward, linear_cross_entropy_sum, sizes_of
from .plan import ONE_BLOCK, TOKEN_CHUNKS, choose, operand_dtype


def fused_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | Collection[int] | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    memory_budget: int | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """Cross entropy from hidden states: the logits are never all there, and those of ignored rows never at all.

    Equivalent to::

        fused_cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, ...)

    Args:
        input: hidden states, (D) or (..., D); float16, bfloat16, float32 or float64.
        linear_weight: (C, D), of input's dtype (any, under autocast). With (C, d1, ..., dK, D), the logits are
            (..., C, d1, ..., dK), as in `F.linear_cross_entropy`.
        target: class indices, input's shape without D (and with d1, ..., dK), int64 or uint8; or class
            probabilities, shaped as the logits, floating.
        linear_bias: (C) or (C, d1, ..., dK).
        weight: (C), class weights as in `F.cross_entropy`.
        ignore_index: a class id, or a collection of them (with -100 among them, if it occurs), in or out of [0, C);
            None means -100. Rows with such a target are dropped before any matrix product.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution.
        softcap: the logits used are `softcap * tanh(logit_scale * x / softcap)`; None for no cap.
        logit_scale: factor on the logits, before the cap.
        z_loss: adds `z_loss * logsumexp(x)**2` per kept row.
        token_weight: target-shaped, floating; multiplies each row's loss and enters the divisor of "mean". A row of
            weight 0 is ignored. Differentiable elsewhere.
        normalizer: number or 0-d tensor that divides the sum in place of the count; with reduction="mean" only.
        memory_budget: bytes of scratch beside the gradients; None for the leanest plan whose predicted time is
            within 5% of the fastest's. `plan_linear_loss` tells what is chosen.
        return_stats: also return `LossStats`, without logits.
        process_group: the vocabulary is sharded over this group, in rank order; shards may be uneven or empty.
            `linear_weight`, `linear_bias`, `weight` and probability targets are then the rank's own shard, while
            `input`, index targets (ids of the whole vocabulary) and everything else are the same on all ranks, which
            get the same bits. The gradient of `input` is that of the whole loss. Not needed for DTensors, and a DTensor
            `input` may also be sharded on its tokens. See `fused_ignore_ce.distributed`.
        backend: what computes between the matrix products: "auto" (Triton for CUDA tensors, PyTorch otherwise),
            "triton" or "torch".

    Returns:
        The loss in nats: a scalar, or target-shaped for "none"; of input's dtype, promoted with probability
        targets, float32 under autocast. With return_stats, (loss, LossStats).

    Raises:
        IndexError: a target that is neither ignored nor in [0, C), on CPU. On CUDA, an asynchronous device assertion.
            With a process_group, on every device and on all ranks.
        ValueError: a memory_budget that no plan meets; the message names the smallest that works.
        ValueError, TypeError, RuntimeError, NotImplementedError: what F.cross_entropy raises for the same mistake.

    Note:
        On CUDA, the number of kept rows is waited for: one host sync a call. Under torch.compile and while a CUDA
        graph is captured there is none; ignored rows then remain in the matrix products, as zeros, and only there.
        The same holds for rows that token_weight ignores when targets are probabilities.

        A scalar loss computes its gradients in forward (three matrix products) and scales them in backward; they
        are kept in the parameters' dtypes. reduction="none", float16 and the plan "vocabulary blocks" compute them
        in backward, from logits computed again (four). Sums over tokens are float32 (float64 for float64) whatever
        the dtype; on CPUs, whose matrix products return bfloat16 for bfloat16, the terms of a sum over chunks are
        rounded to it, and float16 is multiplied in float32. Gradients that nobody needs are not computed. All rows
        ignored, or N = 0: "mean" is NaN, "sum" is 0, the gradients exactly 0; the gradient at a logit of -inf is 0.
        Deterministic. `create_graph=True` raises RuntimeError.

        With a process_group there are two collectives in forward, the first of which is waited for (it tells the
        sizes of the shards), and one in backward: the sum of input's gradient, in float32. Several tiles, where they
        are needed, cost the fourth matrix product, since the ranks exchange their sums once, for all tokens.

    >>> h, w = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    >>> fused_linear_cross_entropy(h, w, torch.tensor([1, -100, 2])).item()
    1.3862943649291992
    """
    tensors = (input, linear_weight, target, linear_bias, weight, token_weight)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "z_loss": z_loss,
        "normalizer": normalizer,
        "memory_budget": memory_budget,
        "return_stats": return_stats,
        "backend": backend,
    }
    if arguments.is_distributed(process_group, *tensors):
        from ..dtensor import local_linear

        return local_linear(_cross_entropy, process_group, *tensors, **options)
    return _cross_entropy(*tensors, **options)


def _cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    ignore_index: int | Collection[int] | None,
    softcap: float | None,
    logit_scale: float,
    memory_budget: int | None,
    return_stats: bool,
    backend: str,
    reduction: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    normalizer: float | Tensor | None = None,
    log_probs: bool = False,
    group: str | None = None,
    sum_dinput: bool = True,
) -> Any:
    """The loss, or with `log_probs` its negative and not cast to input's dtype."""
    is_probs = arguments.check_linear_cross_entropy(input, linear_weight, target, linear_bias, weight)
    if log_probs and is_probs:
        raise TypeError(f"target: expected class indices, int64 or uint8, got {target.dtype} probabilities")
    ids = arguments.ignored_ids(-100 if ignore_index is None else ignore_index)
    if is_probs and any(i >= 0 for i in ids):
        raise RuntimeError(
            f"ignore_index is not supported for floating point target: expected it below 0, got {ignore_index}"
        )
    options = arguments.row_options(ids[0], label_smoothing, softcap, logit_scale, z_loss)
    loss, stats = _loss(
        input,
        linear_weight,
        target,
        is_probs,
        linear_bias,
        weight,
        ids,
        reduction,
        token_weight,
        normalizer,
        _Call(options, memory_budget, return_stats, arguments.choose_backend(backend, input.device), group, sum_dinput),
    )
    dtype = loss_dtype(input, *((target, weight) if is_probs else ()))
    loss = 0.0 - loss if log_probs else loss.to(dtype)  # not -loss: that is -0.0 at ignored rows
    return (loss, stats) if return_stats else loss


def fused_linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | Collection[int] | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """Log-probabilities of the targets, for preference and policy-gradient training.

    Equivalent to::

        F.linear(input, linear_weight, linear_bias).float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    with 0 at ignored targets. `logit_scale` is the inverse of a sampling temperature. All arguments are those of
    `fused_linear_cross_entropy`, with class indices (...) for target.

    Returns:
        (...) in nats, float32 (float64 for float64 input), differentiable in input, linear_weight and linear_bias.
        With return_stats, (log_probs, LossStats); its `entropy` is that of the policy.

    Raises:
        As `fused_linear_cross_entropy`.

    >>> fused_linear_log_probs(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
    tensor([-1.3863,  0.0000])
    """
    tensors = (input, linear_weight, target, linear_bias, None, None)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "memory_budget": memory_budget,
        "return_stats": return_stats,
        "backend": backend,
        "log_probs": True,
    }
    if arguments.is_distributed(process_group, *tensors):
        from ..dtensor import local_linear

        return local_linear(_cross_entropy, process_group, *tensors, **options)
    return _cross_entropy(*tensors, **options)


class _Call(NamedTuple):
    """What is the same for all rows of a call."""

    options: RowOptions
    memory_budget: int | None
    with_stats: bool
    backend: str
    group: str | None  # by name; the vocabulary is sharded over it
    sum_dinput: bool  # whether the gradient of input is to be summed over the group


class _Rows(NamedTuple):
    """What one set of logits gives: the loss of every row or their scaled sum, and statistics (empty if not asked)."""

    loss: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor
    target_weight: Tensor  # empty unless the vocabulary is sharded and has class weights


def _loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    is_probs: bool,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ids: tuple[int, ...],
    reduction: str,
    token_weight: Tensor | None,
    normalizer: float | Tensor | None,
    call: _Call,
) -> tuple[Tensor, LossStats | None]:
    """The loss before it is cast to its dtype, and statistics if asked for."""
    batch, (C, *positions, D) = input.shape[:-1], linear_weight.shape
    N, P = batch.numel(), torch.Size(positions).numel()
    shape = torch.Size((*batch, *positions))
    arguments.check_reduction(reduction, normalizer)
    arguments.check_token_weight(token_weight, shape, input.device)
    arguments.check_memory_budget(call.memory_budget)
    weight = None if weight is None else weight.contiguous()

    # From here on, N rows with P sets of logits each.
    h = input.reshape(N, D)
    probs = target.reshape(N, C, P).movedim(1, 2) if is_probs else None
    index = row_targets(None if is_probs else target, probs, ids, token_weight, call.with_stats and call.group is None)
    kept = index != ids[0]
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    if token_weight is not None:
        token_weight = torch.where(kept, token_weight.reshape(-1).to(acc), 0.0)
    scale = divided = share = None
    if weight is not None and probs is None and call.group is None:
        share = weight[torch.where(kept, index, 0)]
    # Class weights of other ranks' targets come with the loss: it is divided afterwards.
    late = reduction == "mean" and normalizer is None and weight is not None and probs is None and share is None
    if reduction != "none":
        scale = kept.to(acc) if token_weight is None else token_weight
        if reduction == "mean" and not late:
            divided = divisor(kept, share, token_weight) if normalizer is None else normalizer
            scale = torch.where(kept, scale / divided, 0.0)
    rows = [
        _one_position(h, w, b, i, weight, q, s, probs is None or token_weight is not None, call)
        for w, b, i, q, s in zip(
            linear_weight.reshape(C, P, D).unbind(1) if positions else [linear_weight],
            [None] * P if linear_bias is None else linear_bias.reshape(C, P).unbind(1),
            index.view(N, P).unbind(1),
            [None] * P if probs is None else probs.unbind(1),
            [None] * P if scale is None else scale.view(N, P).unbind(1),
            strict=True,
        )
    ]
    fields = _Rows(*(torch.stack(field, -1) for field in zip(*rows, strict=True)))
    loss = fields.loss
    if reduction == "none":
        loss = loss.view(shape)
        loss = loss if token_weight is None else loss * token_weight.view(shape)
    else:
        loss = loss.sum()
        if late:
            divided = divisor(kept, fields.target_weight.flatten(), token_weight)
            loss = loss / torch.where(kept.any(), divided, 1.0)
        if divided is not None:  # 0 / 0 where nothing is kept, and nothing where something is
            divided = divided.detach() if isinstance(divided, Tensor) else divided
            loss = loss + torch.where(kept.any(), 0.0, torch.zeros_like(loss) / divided)
    if not call.with_stats:
        return loss, None
    return loss, LossStats(kept.sum(), fields.lse.view(shape), fields.correct.view(shape), fields.entropy.view(shape))


def _one_position(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    index: Tensor,
    weight: Tensor | None,
    probs: Tensor | None,
    scale: Tensor | None,
    may_be_ignored: bool,
    call: _Call,
) -> _Rows:
    """Losses of the logits h @ w.T + b (N, C); their sum times `scale` (N,), if that is given."""
    options, memory_budget, with_stats, backend, group, sum_dinput = call
    N = len(index)
    if not torch.compiler.is_compiling():
        refuse_transforms(h, w, b, probs)
    index, rows = index.contiguous(), None
    gathered = False
    if probs is None and _may_wait(h):
        rows = (index != options.ignore_index).nonzero().squeeze(1)
        if len(rows) == N:
            rows = None
        else:
            gathered = True
            h, index = h.index_select(0, rows), index.index_select(0, rows)
            scale = None if scale is None else scale.index_select(0, rows)
    elif may_be_ignored:
        # Selected, not multiplied by 0: nothing of an ignored row reaches a matrix product.
        gathered = True
        h = torch.where((index != options.ignore_index).unsqueeze(1), h, 0.0)
    if group is not None and sum_dinput:
        from ..distributed import Replicated

        h = Replicated.apply(h, group)

    dtype = h.dtype
    if torch.is_autocast_enabled(h.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(h.device.type)
    operand = operand_dtype(dtype, h.device)
    tensors = (h, w, b, index, weight, probs)
    rest = (*options, operand, memory_budget, gathered, with_stats)
    need_dh, need_dw, need_db = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (h, w, b))
    at_once = scale is not None and dtype != torch.float16 and not (probs is not None and probs.requires_grad)
    if need_dh or need_dw or need_db:
        if is_plain(h):  # a budget that is too small is an error here, not in backward
            sizes = sizes_of(
                h, w, probs, operand,
                dinput=need_dh, dweight=need_dw, gathered=gathered, recompute=not at_once, group=group,
            )  # fmt: skip
            plan = choose(sizes, memory_budget).plan
            at_once = at_once and (plan == ONE_BLOCK or (plan == TOKEN_CHUNKS and group is None))
        else:  # sizes may be symbolic, and are not looked at
            at_once = memory_budget is None and at_once
    if at_once:
        total, loss, lse, correct, entropy, target_weight, *_ = linear_cross_entropy_sum(
            *tensors, scale, *rest, need_dh, need_dw, need_db, backend, group
        )
    else:
        loss, lse, _, correct, entropy, target_weight, _ = linear_cross_entropy_forward(*tensors, *rest, backend, group)
        total = loss if scale is None else (loss * scale).sum()
    if scale is None:
        total = _spread(total, rows, N)
    if group is not None and weight is not None and probs is None:
        target_weight = _spread(target_weight, rows, N)
    if not with_stats:
        return _Rows(total, entropy, correct, entropy, target_weight)
    lse, correct, entropy = (_spread(t, rows, N) for t in (lse[0] + lse[1], correct, entropy))
    return _Rows(total, lse, correct, entropy, target_weight)


def _may_wait(h: Tensor) -> bool:
    """Whether the number of kept rows may be asked for."""
    return is_plain(h) and not (h.is_cuda and torch.cuda.is_current_stream_capturing())


def _spread(values: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """Values of the kept rows among zeros for the others."""
    return values if rows is None else values.new_zeros(N).index_copy(0, rows, values)
