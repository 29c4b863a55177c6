"""The public functions: check the arguments, choose a backend, reduce."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .autograd import cross_entropy_rows
from .reduction import LossStats, divisor, loss_dtype, row_targets


def fused_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | Collection[int] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """Cross entropy between logits and targets, at no cost for ignored rows.

    Equivalent to::

        x = softcap * torch.tanh(logit_scale * input.float() / softcap)    # without softcap: logit_scale * input
        loss = F.cross_entropy(x, target, weight, reduction="none", label_smoothing=label_smoothing)
        loss = (loss + z_loss * x.logsumexp(1) ** 2) * token_weight        # then reduced

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ..., dK); float16, bfloat16, float32 or float64; any strides.
            Never upcast it: arithmetic is float32 inside (float64 for float64).
        target: class indices, () or (N) or (N, d1, ..., dK), int64 or uint8; or class probabilities of input's
            shape, any floating dtype. Probabilities get a gradient if they require one.
        weight: (C), the dtype of input; scales each class's loss, and `"mean"` divides by the kept targets' weights.
        ignore_index: a class id, or a collection of them (with -100 among them, if it occurs), in or out of [0, C).
            Rows with such a target are not read; they add exactly 0 to the loss and get exactly-zero gradients, even
            where they hold NaN.
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
            whoever needs the logits afterwards. Without effect under torch.compile, which plans memory itself.
        return_stats: also return `LossStats`, from the same pass.
        process_group: the vocabulary is sharded over this group, in rank order; shards may be uneven or empty. `input`,
            `weight` and probability targets are then the rank's own shard, while index targets and `ignore_index` are
            ids of the whole vocabulary; all ranks pass the same of them and of everything else, and get the same bits.
            Not needed for DTensors. See `fused_ignore_ce.distributed`.
        backend: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "torch".

    Returns:
        The loss in nats: a scalar, or target-shaped for "none"; of input's dtype, promoted with probability
        targets, float32 under autocast. With return_stats, (loss, LossStats).

    Raises:
        IndexError: a target that is neither ignored nor in [0, C), on CPU. On CUDA, an asynchronous device
            assertion, as PyTorch's. With a process_group, on every device and on all ranks.
        ValueError, TypeError, RuntimeError, NotImplementedError: what F.cross_entropy raises for the same mistake.

    Note:
        Beside the gradient itself, memory is O(N) on CUDA and one cache-sized block on CPU; the forward saves the
        logits and two numbers a row. All rows ignored, or N = 0: "mean" is NaN, "sum" is 0, the gradient exactly 0.
        The gradient at a logit of -inf is 0. `create_graph=True` works, at the memory of plain PyTorch, but not with
        a process_group. Deterministic. With a process_group there are two collectives in forward, the first of which
        is waited for (it tells the sizes of the shards), and none in backward.

    >>> logits = torch.zeros(3, 4, requires_grad=True)
    >>> fused_cross_entropy(logits, torch.tensor([1, -100, 2])).item()
    1.3862943649291992
    """
    tensors = (input, target, weight, token_weight)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "z_loss": z_loss,
        "normalizer": normalizer,
        "inplace_backward": inplace_backward,
        "return_stats": return_stats,
        "backend": backend,
    }
    if arguments.is_distributed(process_group, *tensors):
        from .dtensor import local_logits

        return local_logits(_cross_entropy, process_group, *tensors, **options)
    return _cross_entropy(*tensors, **options)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    ignore_index: int | Collection[int],
    **options: Any,
) -> Any:
    is_probs = arguments.check_cross_entropy(input, target, weight)
    if is_probs and any(i >= 0 for i in arguments.ignored_ids(ignore_index)):
        raise RuntimeError(
            f"ignore_index is not supported for floating point target: expected it below 0, got {ignore_index}"
        )
    x = _classes_last(input)
    return row_loss(
        x,
        _classes_last(target) if is_probs else target.reshape(x.shape[:2]),
        weight,
        shape=torch.Size([*input.shape[:1], *input.shape[2:]][: input.dim() - 1]) if is_probs else target.shape,
        out_dtype=loss_dtype(input, *((target, weight) if is_probs else ())),
        ignore_index=ignore_index,
        token_weight=token_weight,
        **options,
    )


def row_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    shape: torch.Size,
    out_dtype: torch.dtype,
    ignore_index: int | Collection[int] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
    group: str | None = None,
) -> Any:
    """The loss of logits x (B, T, V) with indices (B, T) or probabilities (B, T, V), both already checked.

    `shape` is that of the caller's row losses. With a process group, by name, x is its rank's shard.
    """
    ids = arguments.ignored_ids(ignore_index)
    options = arguments.row_options(ids[0], label_smoothing, softcap, logit_scale, z_loss)
    arguments.check_reduction(reduction, normalizer)
    arguments.check_token_weight(token_weight, shape, x.device)
    if inplace_backward:
        arguments.check_inplace(x)
    weight = None if weight is None else weight.contiguous()
    probs = target if target.dim() == 3 else None
    index = row_targets(target if probs is None else None, probs, ids, token_weight, return_stats and group is None)

    loss, lse, correct, entropy, target_weight = cross_entropy_rows(
        x,
        index,
        weight,
        probs,
        options,
        with_stats=return_stats,
        inplace_backward=inplace_backward,
        backend=arguments.choose_backend(backend, x.device),
        group=group,
    )
    kept = index != options.ignore_index
    if token_weight is not None:
        token_weight = torch.where(kept, token_weight.reshape(-1).to(loss.dtype), 0.0)
        loss = loss * token_weight
    if reduction == "none":
        loss = loss.view(shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            share = None
            if weight is not None and probs is None:
                share = target_weight if group is not None else weight[torch.where(kept, index, 0)]
            loss = loss / (divisor(kept, share, token_weight) if normalizer is None else normalizer)
    loss = loss.to(out_dtype)
    if not return_stats:
        return loss
    return loss, LossStats(kept.sum(), (lse[0] + lse[1]).view(shape), correct.view(shape), entropy.view(shape))


def _classes_last(t: Tensor) -> Tensor:
    """(C), (N, C) or (N, C, d1..dK) as (B, T, C): a view unless K > 1 and the d's cannot be merged."""
    if t.dim() == 1:
        return t.view(1, 1, -1)
    if t.dim() == 2:
        return t.unsqueeze(0)
    return t.movedim(1, -1).flatten(1, -2)
