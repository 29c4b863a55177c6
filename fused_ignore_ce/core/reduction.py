"""From the results of rows to what the caller gets, for all losses: divisors, sums and statistics.

Triton's kernels reduce the plain losses of logits themselves, by the same formulas (`kernels/reduce.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .eager import autocasts, is_tracing
from .options import ReductionOptions
from .tensors import Sizes, holds_probabilities


class LossStats(NamedTuple):
    """Statistics of the rows, from the same pass over the logits as the loss. They are 0 (False) at ignored rows.

    They are detached, unless `return_stats="differentiable"`: then `lse` and `entropy` have gradients.

    Attributes:
        num_tokens: rows that were not ignored; 0-d int64.
        lse: log(sum(exp(used logits))) in nats; target-shaped, float32 (float64 for float64 input).
        correct: whether the largest logit (the first of them on ties) is the target's; target-shaped bool.
        entropy: entropy of the softmax in nats; target-shaped, float32 (float64 for float64 input).
        predicted: the class of the largest logit (the first of them on ties); target-shaped int64.
        token_loss: the loss in nats before reduction, without z-loss and token weights; target-shaped, float32 (float64
            for float64 input). Always detached.
    """

    num_tokens: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor
    predicted: Tensor
    token_loss: Tensor


class Targets(NamedTuple):
    """The targets of N rows as the backends want them, and the weight of each row in the reduction."""

    target: Tensor  # (N,) int64, contiguous; the class that counts as correct with probability targets
    ignored: int  # the target of ignored rows
    token_weight: Tensor | None  # (N,), not read at ignored rows
    shape: torch.Size  # of the caller's row losses
    acc: torch.dtype  # the dtype of sums

    @property
    def kept(self) -> Tensor:
        """(N,) bool."""
        return self.target != self.ignored

    @property
    def share(self) -> Tensor:
        """The weight of each row (N,) in a mean without class weights: 0 at ignored rows."""
        if self.token_weight is None:
            return self.kept.to(self.acc)
        return torch.where(self.kept, self.token_weight.to(self.acc), 0.0)

    def with_classes(self, classes: Tensor) -> Targets:
        """The same rows with other classes (N,) that count as correct; ignored rows stay ignored."""
        return self._replace(target=torch.where(self.kept, classes, self.ignored))


def prepare_targets(
    target: Tensor,
    token_weight: Tensor | None,
    ids: tuple[int, ...],
    sizes: Sizes,
    *,
    acc: torch.dtype,
    with_stats: bool,
    sharded: bool,
) -> Targets:
    """Marks every ignored row by `ids[0]`; a row of token weight 0 is ignored too.

    `target` are indices or probabilities of `sizes`. With probabilities, the class of the largest counts as correct.
    Without classes, all rows are ignored. With a sharded vocabulary, these two come from all ranks.
    """
    if not holds_probabilities(target):
        index = target if target.dim() == 1 else _unshared(target, ids[0]).reshape(-1)
        index = index.long().contiguous()
    elif with_stats and not sharded and sizes.classes:
        index = target.detach().argmax(len(sizes.batch)).reshape(-1)
    else:
        class_of_all = 0 if sharded or sizes.classes else ids[0]
        index = torch.full((sizes.rows.numel(),), class_of_all, dtype=torch.int64, device=target.device)
    ignored = None
    for extra in ids[1:]:
        ignored = index == extra if ignored is None else ignored | (index == extra)
    if token_weight is not None:
        unweighted = token_weight.detach().reshape(-1) == 0
        ignored = unweighted if ignored is None else ignored | unweighted
    if ignored is not None:
        index = index.masked_fill(ignored, ids[0])
    shape = sizes.rows if holds_probabilities(target) else target.shape
    return Targets(index, ids[0], None if token_weight is None else token_weight.reshape(-1), shape, acc)


def _unshared(target: Tensor, ignored: int) -> Tensor:
    """While tracing, a copy of the target: Inductor does not notice a write to a tensor whose view backward needs."""
    return torch.where(target == ignored, ignored, target) if is_tracing() else target


def weight_of_target(targets: Targets, weight: Tensor | None, probs: Tensor | None) -> Tensor | None:
    """The class weight of each row's index target (N,), which enters the divisor of "mean"; None without weights."""
    if weight is None or probs is not None:
        return None
    return weight[torch.where(targets.kept, targets.target, 0)]


class Scales(NamedTuple):
    """The factors of the rows' losses and of their z-losses in the sum; they are 0 at ignored rows."""

    loss: Tensor  # (N,)
    z_loss: Tensor | None  # (N,); None without z-loss
    divisor: float | Tensor | None  # what the scales of losses were divided by
    nothing: Tensor | None  # what is added to the sum: NaN where nothing is kept and "mean" divides by 0, else 0


def scales(targets: Targets, reduction: ReductionOptions, z_loss: float, target_weight: Tensor | None) -> Scales:
    """The scales of "sum" or "mean". `target_weight` (N,) are the class weights of index targets; None or empty: all 1.

    "mean" divides the losses by the kept rows, each counted with its token weight and the class weight of its target;
    and the z-losses by the kept rows with their token weights only, as class weights do not scale them either.
    """
    kept, share = targets.kept, targets.share
    if reduction.reduction == "sum":
        return Scales(share, share if z_loss else None, None, None)
    divisor: float | Tensor
    weighted = share
    if reduction.normalizer is not None:
        divisor = reduction.normalizer
    else:
        if target_weight is not None and len(target_weight):
            weighted = torch.where(kept, target_weight.to(targets.acc) * share, 0.0)
        divisor = weighted.sum()
        divisor = torch.where(divisor == 0, torch.nan, divisor)  # as PyTorch's mean, smoothing included
    scale = torch.where(kept, share / divisor, 0.0)
    z_scale = None
    if z_loss:
        z_scale = scale if weighted is share else torch.where(kept, share / share.sum(), 0.0)
    # NaN, as PyTorch's mean of nothing; the scales of ignored rows are 0 all the same.
    zero = share.new_zeros(())
    nothing = torch.where(kept.any(), zero, zero / (divisor.detach() if isinstance(divisor, Tensor) else divisor))
    return Scales(scale, z_scale, divisor, nothing)


def row_losses(loss: Tensor, lse: Tensor, targets: Targets, z_loss: float) -> Tensor:
    """The losses of reduction="none", in the caller's shape."""
    if z_loss:
        loss = loss + z_loss * lse.square()
    if targets.token_weight is not None:
        loss = loss * targets.share
    return loss.view(targets.shape)


def scaled_total(loss: Tensor, lse: Tensor, scale: Tensor, z_scale: Tensor | None, z_loss: float) -> Tensor:
    """`sum(loss * scale)`, and with a `z_scale` also `z_loss * sum(lse**2 * z_scale)`."""
    total = (loss * scale).sum()
    return total if z_scale is None else total + z_loss * (lse.square() * z_scale).sum()


def reduce_rows(
    loss: Tensor,
    lse: Tensor,
    targets: Targets,
    reduction: ReductionOptions,
    z_loss: float,
    target_weight: Tensor | None,
) -> Tensor:
    """The loss from the rows' losses: by "none", "sum" or "mean"."""
    if reduction.reduction == "none":
        return row_losses(loss, lse, targets, z_loss)
    scale = scales(targets, reduction, z_loss, target_weight)
    total = scaled_total(loss, lse, scale.loss, scale.z_loss, z_loss)
    return total if scale.nothing is None else total + scale.nothing


def loss_dtype_of(loss_dtype: torch.dtype | None, input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of the loss: the caller's, or PyTorch's rule, which autocast and probability targets take part in."""
    if loss_dtype is not None:
        return loss_dtype
    dtype = input.dtype
    if holds_probabilities(target):
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if autocasts(input.device) and dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return dtype


def finished(loss: Tensor, targets: Targets, reduction: ReductionOptions, dtype: torch.dtype) -> Tensor:
    """Casts the loss to the caller's dtype, and turns the mean of no rows into 0 if that was asked for."""
    if reduction.zero_if_all_ignored and reduction.reduction == "mean":
        loss = torch.where(targets.kept.any(), loss, 0.0)
    return loss if loss.dtype == dtype else loss.to(dtype)


def statistics(
    targets: Targets,
    reduction: ReductionOptions,
    loss: Tensor,
    lse: Tensor,
    predicted: Tensor,
    entropy: Tensor,
    num_tokens: Tensor | None = None,
) -> LossStats:
    """Statistics in the caller's shape. `num_tokens` is the number of kept rows, if it is known already.

    `loss` are the losses of rows, without z-loss and token weights.
    """
    if reduction.return_stats != "differentiable":
        lse, entropy = lse.detach(), entropy.detach()
    kept = targets.kept
    correct = kept & (predicted == targets.target)
    shape = targets.shape
    return LossStats(
        kept.sum() if num_tokens is None else num_tokens,
        lse.view(shape),
        correct.view(shape),
        entropy.view(shape),
        predicted.view(shape),
        loss.detach().view(shape),
    )
