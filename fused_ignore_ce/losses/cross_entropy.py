"""`fused_cross_entropy`: check the arguments, then compute the loss in the way that fits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from typing_extensions import Unpack

from ..core.eager import overridden
from ..core.options import CrossEntropyKeywords, LossOptions, ReductionOptions, ignored_ids
from ..core.reduction import LossStats
from ..core.tensors import LogitsTensors
from ..core.unknown_keywords import explains_keywords
from ..distributed.shards import local_logits
from ..logits.problem import logits_problem
from ..logits.ways import way_of


@overload
def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor: ...
@overload
def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_stats: Literal[True, "differentiable"],
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_stats: bool | Literal["differentiable"] = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor | tuple[Tensor, LossStats]: ...
@explains_keywords
def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | Collection[int] | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    return_stats: bool | Literal["differentiable"] = False,
    loss_dtype: torch.dtype | None = None,
    zero_if_all_ignored: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross entropy between logits and targets, at no cost for ignored rows.

    Equivalent to:

        x = softcap * torch.tanh(logit_scale * input.float() / softcap)    # without softcap: logit_scale * input
        loss = F.cross_entropy(x, target, weight, reduction="none", label_smoothing=label_smoothing)
        loss = (loss + z_loss * x.logsumexp(1) ** 2) * token_weight        # then reduced

    except for a mean with class weights: they do not scale the z-loss, which is divided by the number of kept rows.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ..., dK); float16, bfloat16, float32 or float64; any strides.
            Never upcast it: arithmetic is float32 inside (float64 for float64).
        target: class indices, () or (N) or (N, d1, ..., dK), int64 or uint8; or class probabilities of input's
            shape, any floating dtype. Probabilities get a gradient if they require one.
        weight: (C), the dtype of input, or float32 with 16-bit logits; scales each class's loss, and "mean" divides by
            the kept targets' weights.
        ignore_index: a class id, or a collection of them, in or out of [0, C). It replaces -100: where that occurs
            too, pass [-100, 0]. None means -100; there is no value that ignores nothing. Rows with such a target are
            not read; they add exactly 0 to the loss and get exactly-zero gradients, even where they hold NaN.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1]; mixes the target with the uniform distribution (Szegedy et al. 2016,
            "Rethinking the Inception Architecture for Computer Vision").
        softcap: bounds the logits smoothly (Gemma Team 2024, "Gemma 2"). Above 0, or None for no bound.
        logit_scale: factor on the logits, before the cap.
        z_loss: adds `z_loss * logsumexp(x)**2` per kept row (Chowdhery et al. 2022, "PaLM"); differentiable.
        token_weight: target-shaped, floating; multiplies each row's loss and enters the divisor of "mean". A row
            of weight 0 is ignored. Differentiable elsewhere.
        normalizer: number or 0-d tensor that divides the sum in place of the count; with reduction="mean" only.
        inplace_backward: let backward write the gradient over input's memory. Autograd's version check catches
            other uses of the logits afterwards. Without effect under torch.compile, which plans memory itself.
        grad_in_forward: compute the gradient of a scalar loss along with it, so that the logits are read from device
            memory once. It is held until backward in place of the logits (in their memory with inplace_backward, which
            then writes there in forward), and exact for any upstream gradient: backward multiplies it on the device,
            and moves nothing where upstream is 1, but `create_graph=True` is an error. Where the gradient cannot be
            computed in forward (reduction="none", a sharded vocabulary, gradients of probabilities, token weights, a
            normalizer or statistics, tracing), it is computed in backward.
        return_stats: also return `LossStats`, from the same pass: detached if True, so that a loss which they are added
            to takes them as constants; with gradients of `lse` and `entropy` if "differentiable".
        loss_dtype: the dtype of the loss. None is PyTorch's rule, which rounds the loss of 16-bit logits to 16 bits: a
            sum over many tokens may overflow in float16. Sums are float32 inside, whatever it is.
        zero_if_all_ignored: let "mean" be 0 instead of NaN where all rows are ignored, for averages of logged losses.
        process_group: the vocabulary is sharded over this group, in rank order; shards may be uneven or empty. `input`,
            `weight` and probability targets are then the rank's own shard, while index targets and `ignore_index` are
            ids of the whole vocabulary. Whatever is not a shard is the same on all ranks, which get the same bits. Not
            needed for DTensors. See `fused_ignore_ce.distributed`.
        backend: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "torch".

    Returns:
        The loss in nats: a scalar, or target-shaped for "none"; of dtype loss_dtype or else of input's, promoted with
        probability targets, float32 under autocast. With return_stats, (loss, LossStats).

    Raises:
        IndexError: a target that is neither ignored nor in [0, C), on CPU. On CUDA, an asynchronous device
            assertion, as PyTorch's. With a process_group, on every device and on all ranks.
        ValueError, TypeError, RuntimeError, NotImplementedError: what F.cross_entropy raises for the same mistake.

    Note:
        Beside the gradient itself, memory is O(N) on CUDA and one cache-sized block on CPU; the forward saves the
        logits and three numbers per row. All rows ignored, or N = 0: "mean" is NaN, "sum" is 0, the gradient exactly 0.
        The gradient at a logit of -inf is 0. `create_graph=True` works, at the memory of plain PyTorch, but not with
        a process_group. Deterministic. With a process_group there are two collectives in forward, the first of which
        is waited for (it tells the sizes of the shards), and none in backward.

    Examples:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> fused_cross_entropy(logits, torch.tensor([1, -100, 2])).item()
        1.3862943649291992
    """
    if overridden(input):
        return handle_torch_function(
            fused_cross_entropy, (input,), input, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss,
            token_weight=token_weight, normalizer=normalizer, inplace_backward=inplace_backward,
            grad_in_forward=grad_in_forward, return_stats=return_stats, loss_dtype=loss_dtype,
            zero_if_all_ignored=zero_if_all_ignored, process_group=process_group, backend=backend,
        )  # fmt: skip
    with local_logits(process_group, LogitsTensors(input, target, weight, token_weight)) as (group, tensors):
        ids = ignored_ids(ignore_index)
        options = LossOptions(ids[0], label_smoothing, softcap, logit_scale, z_loss).checked()
        reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype, zero_if_all_ignored).checked()
        problem = logits_problem(
            tensors, ids, options, reducing, backend, group,
            inplace_backward=inplace_backward, grad_in_forward=grad_in_forward,
        )  # fmt: skip
    loss: Tensor | tuple[Tensor, LossStats] = way_of(problem).loss(problem)
    return loss
