"""`fused_linear_cross_entropy`: check the arguments, compute the rows that are kept, reduce."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.options import LinearKeywords, LossOptions, ReductionOptions, ignored_ids
from ..core.reduction import LossStats
from ..core.tensors import LinearTensors
from ..core.unknown_keywords import explains_keywords
from ..distributed.shards import local_linear
from ..linear.problem import linear_problem


@overload
def fused_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearKeywords],
) -> Tensor: ...
@overload
def fused_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True, "differentiable"],
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: bool | Literal["differentiable"] = ...,
    **options: Unpack[LinearKeywords],
) -> Tensor | tuple[Tensor, LossStats]: ...
@explains_keywords
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
    memory_budget: int | str | None = None,
    logits_dtype: torch.dtype | None = None,
    return_stats: bool | Literal["differentiable"] = False,
    loss_dtype: torch.dtype | None = None,
    zero_if_all_ignored: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross entropy from hidden states, computed tile by tile; ignored rows are dropped before any matrix product.

    Equivalent to:

        fused_cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight, ...)

    Args:
        input: hidden states, (D) or (..., D); float16, bfloat16, float32 or float64.
        linear_weight: (C, D), of input's dtype (any, under autocast). With (C, d1, ..., dK, D), the logits are
            (..., C, d1, ..., dK), as in `F.linear_cross_entropy`.
        target: class indices, input's shape without D (and with d1, ..., dK), int64 or uint8; or class
            probabilities, shaped as the logits, floating.
        linear_bias: (C) or (C, d1, ..., dK).
        weight: (C), class weights as in `F.cross_entropy`; of input's dtype, or float32 with 16-bit hidden states.
        ignore_index: a class id, or a collection of them, in or out of [0, C). It replaces -100: where that occurs
            too, pass [-100, 0]. None means -100. Rows with such a target are dropped before any matrix product.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution.
        softcap: the logits used are `softcap * tanh(logit_scale * x / softcap)`; None for no cap.
        logit_scale: factor on the logits, before the cap.
        z_loss: adds `z_loss * logsumexp(x)**2` per kept row.
        token_weight: target-shaped, floating; multiplies each row's loss and enters the divisor of "mean". A row of
            weight 0 is ignored. Differentiable elsewhere.
        normalizer: number or 0-d tensor that divides the sum in place of the count; with reduction="mean" only.
        memory_budget: bytes of scratch beside the gradients, an int or a string such as "512MiB"; None for the leanest
            plan whose predicted time is within 5% of the fastest's. `plan_linear_loss` tells what is chosen.
        logits_dtype: torch.float32 for logits of 16-bit operands that are never rounded to 16 bits, so that
            log-probabilities agree with an inference engine whose head is float32; None rounds them as `F.linear` does.
        return_stats: also return `LossStats`, without logits: detached if True; with gradients of `lse` and `entropy`
            if "differentiable", which computes all gradients in backward.
        loss_dtype: the dtype of the loss; None is PyTorch's rule, as in `fused_cross_entropy`.
        zero_if_all_ignored: let "mean" be 0 instead of NaN where all rows are ignored.
        process_group: the vocabulary is sharded over this group, in rank order; shards may be uneven or empty.
            `linear_weight`, `linear_bias`, `weight` and probability targets are then the rank's own shard, while
            `input`, index targets (ids of the whole vocabulary) and everything else are the same on all ranks, which
            get the same bits. The gradient of `input` is that of the whole loss. Not needed for DTensors, and a DTensor
            `input` may also be sharded on its tokens. See `fused_ignore_ce.distributed`.
        backend: what computes between the matrix products: "auto" (Triton for CUDA tensors, PyTorch otherwise),
            "triton" or "torch".

    Returns:
        The loss in nats: a scalar, or target-shaped for "none"; of dtype loss_dtype or else of input's, promoted with
        probability targets, float32 under autocast. With return_stats, (loss, LossStats).

    Raises:
        IndexError: a target that is neither ignored nor in [0, C), on CPU. On CUDA, an asynchronous device assertion.
            With a process_group, on every device and on all ranks.
        ValueError: a memory_budget that no plan meets; the message names the smallest that works.
        ValueError, TypeError, RuntimeError, NotImplementedError: what F.cross_entropy raises for the same mistake.

    Note:
        On CUDA, the number of kept rows is waited for: one host sync per call. Under torch.compile and while a CUDA
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

    Examples:
        >>> h, w = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> fused_linear_cross_entropy(h, w, torch.tensor([1, -100, 2])).item()
        1.3862943649291992
    """
    tensors = LinearTensors(input, linear_weight, target, linear_bias, weight, token_weight)
    with local_linear(process_group, tensors) as (group, tensors):
        ids = ignored_ids(ignore_index)
        options = LossOptions(ids[0], label_smoothing, softcap, logit_scale, z_loss).checked()
        reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype, zero_if_all_ignored).checked()
        problem = linear_problem(tensors, ids, options, reducing, memory_budget, logits_dtype, backend, group)
    loss: Tensor | tuple[Tensor, LossStats] = problem.loss()
    return loss
