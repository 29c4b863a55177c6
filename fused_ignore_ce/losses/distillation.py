"""Distillation: the divergence of a student's distribution from a teacher's, of logits or from hidden states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..backends.choice import check_targets
from ..backends.divergences import DistilledRows
from ..core.distillation import (
    DistillationOptions,
    check_floating,
    check_same_classes,
    check_target,
    check_teacher,
    check_teacher_head,
    check_top_k,
    refuse_kernels,
    refuse_process_group,
)
from ..core.eager import autocasts, is_plain, may_wait, refuse_transforms
from ..core.options import LossOptions, ReductionOptions, budget_bytes, ignored_ids
from ..core.reduction import (
    LossStats,
    Targets,
    finished,
    loss_dtype_of,
    prepare_targets,
    row_losses,
    scales,
    statistics,
)
from ..core.rows import acc_dtype
from ..core.tensors import Sizes, check_linear, check_token_weight
from ..core.unknown_keywords import explains_keywords
from ..linear import distillation as of_hidden
from ..linear.distillation import Settings, Side
from ..linear.plan import operand_dtype
from ..logits import distillation as of_logits


@explains_keywords
def fused_distillation_loss(
    input: Tensor,
    teacher_input: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    scale_by_temperature: bool = False,
    ignore_index: int | Collection[int] | None = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """The divergence of a student's softmax from a teacher's, token by token, from the logits of both.

    Equivalent, with the defaults and T = temperature, to:

        p, log_q = (teacher_input.float() / T).softmax(-1), (input.float() / T).log_softmax(-1)
        F.kl_div(log_q, p, reduction="none").sum(-1)[target != ignore_index].mean()

    Args:
        input: the student's logits, (..., V); float16, bfloat16, float32 or float64. Classes are last.
        teacher_input: the teacher's logits, of input's shape and of any of these dtypes. A constant.
        target: class indices (...), int64 or uint8, or None if no token is ignored. Tokens whose target is ignored cost
            nothing. With alpha below 1, the others are hard labels, too.
        divergence: with p the teacher's and q the student's distribution, both at `temperature`: "forward_kl",
            sum(p * (log p - log q)); "reverse_kl", sum(q * (log q - log p)); "jsd", beta * KL(p | m) + (1 - beta) *
            KL(q | m) with m = beta * p + (1 - beta) * q (Agarwal et al., arXiv:2306.13649).
        beta: above 0 and below 1; used by "jsd" only.
        temperature: divides the used logits of both sides; a number above 0.
        alpha: the loss of a token is alpha * divergence + (1 - alpha) * cross entropy, the latter at temperature 1.
        scale_by_temperature: multiply the divergence by temperature**2 (Hinton et al., arXiv:1503.02531).
        ignore_index: a class id, or a collection of them, in or out of [0, V); None means -100.
        reduction: "mean" (over the kept tokens), "sum" or "none".
        softcap, logit_scale: the student's logits used are `softcap * tanh(logit_scale * x / softcap)`.
        teacher_softcap, teacher_logit_scale: the same for the teacher.
        token_weight: (...), floating; multiplies each token's loss and enters the divisor of "mean".
        normalizer: number or 0-d tensor that divides the sum in place of the count; with reduction="mean" only.
        return_stats: also return `LossStats` of the student, detached.
        loss_dtype: the dtype of the loss; None is input's, float32 under autocast.
        process_group: not supported yet.
        backend: "auto" or "torch", PyTorch on every device; there is no Triton kernel yet.

    Returns:
        The loss in nats: a scalar, or of shape (...) for "none". With return_stats, (loss, LossStats).

    Raises:
        ValueError: shapes or vocabularies that differ; a temperature that is not above 0; alpha or beta out of range;
            alpha below 1 without target.
        IndexError: with alpha below 1, a target that is neither ignored nor in [0, V).
        NotImplementedError: a process_group; backend="triton".

    Note:
        Sums are float32 (float64 for float64). Forward reads the logits of both sides; backward reads both and writes
        one gradient, which is exactly 0 at ignored tokens. A class of probability 0 contributes 0 where the formula has
        0 * log(0). All tokens ignored: "mean" is NaN, "sum" is 0. `create_graph=True` raises RuntimeError.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> fused_distillation_loss(x, torch.zeros(2, 2), torch.tensor([0, -100]))
        tensor(0.1201)
    """
    refuse_process_group(process_group)
    refuse_kernels(backend)
    check_teacher("teacher_input", teacher_input, input)
    check_floating("input", input)
    check_floating("teacher_input", teacher_input)
    V = input.shape[-1]
    check_same_classes("teacher_input", V, teacher_input.shape[-1])
    ids = ignored_ids(ignore_index)
    options = DistillationOptions(
        LossOptions(ids[0], softcap=softcap, logit_scale=logit_scale), divergence, beta, temperature, alpha,
        scale_by_temperature, teacher_softcap, teacher_logit_scale,
    ).checked()  # fmt: skip
    reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype).checked()
    refuse_transforms(input)
    targets = _targets(input, target, token_weight, ids, V, options)
    rows = of_logits.distilled(
        input.reshape(-1, V), teacher_input.detach().reshape(-1, V), targets.target, bool(return_stats), options
    )
    if reduction == "none":
        loss = row_losses(rows.loss, rows.loss, targets, 0.0)
    else:
        scale = scales(targets, reducing, 0.0, None)
        loss = (rows.loss * scale.loss).sum()
        loss = loss if scale.nothing is None else loss + scale.nothing
    return _result(loss, rows, targets, reducing, input, lambda values: values)


@explains_keywords
def fused_linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    scale_by_temperature: bool = False,
    ignore_index: int | Collection[int] | None = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    memory_budget: int | str | None = None,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """`fused_distillation_loss` from the hidden states of both sides, whose logits exist for some tokens at a time.

    Equivalent to:

        fused_distillation_loss(
            F.linear(input, linear_weight, linear_bias), F.linear(teacher_input, teacher_weight, teacher_bias), target, ...
        )

    Args:
        input: the student's hidden states, (..., D); float16, bfloat16, float32 or float64.
        linear_weight: the student's head, (V, D), of input's dtype (any, under autocast).
        teacher_input: the teacher's hidden states, (..., E), whose size E may differ from D. A constant.
        teacher_weight: the teacher's head, (V, E), of teacher_input's dtype. A constant.
        linear_bias, teacher_bias: (V).
        memory_budget: bytes of scratch beside the gradients, an int or a string such as "512MiB"; None for chunks of
            tokens whose logits take 512 MiB, and of 256 tokens at least.

    All other arguments are those of `fused_distillation_loss`.

    Returns:
        What `fused_distillation_loss` returns. Differentiable in input, linear_weight and linear_bias.

    Raises:
        ValueError: what `fused_distillation_loss` raises; a memory_budget that is too small, with the smallest that works.
        RuntimeError: operands whose shapes or dtypes do not fit.

    Note:
        Ignored tokens take part in no matrix product of either side. A scalar loss computes its gradients in forward
        (three products for the student, one for the teacher) and scales them in backward; reduction="none" and float16
        compute them in backward, from logits computed again. Where ignored rows are dropped, their number is waited for:
        one host sync on CUDA, and none under torch.compile, where they remain in the products as zeros.

    Examples:
        >>> h, w = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> fused_linear_distillation_loss(h, w, torch.ones(3, 5), torch.zeros(4, 5)).item()
        0.0
    """
    refuse_process_group(process_group)
    refuse_kernels(backend)
    V = _check_student(input, linear_weight, linear_bias)
    check_teacher("teacher_input", teacher_input, input)
    check_teacher_head(teacher_input, teacher_weight, teacher_bias, V)
    ids = ignored_ids(ignore_index)
    options = DistillationOptions(
        LossOptions(ids[0], softcap=softcap, logit_scale=logit_scale), divergence, beta, temperature, alpha,
        scale_by_temperature, teacher_softcap, teacher_logit_scale,
    ).checked()  # fmt: skip
    reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype).checked()
    refuse_transforms(input, linear_weight, linear_bias)
    targets = _targets(input, target, token_weight, ids, V, options)
    teacher = Side(*_constant(teacher_input.flatten(0, -2), teacher_weight, teacher_bias))
    student = Side(input.flatten(0, -2), linear_weight, linear_bias)
    dtypes = _product_dtype(input), _product_dtype(teacher_input)
    settings = Settings(bool(return_stats), *dtypes, budget_bytes(memory_budget))
    return _of_hidden_states(student, teacher, targets, settings, options, reducing, input)


@explains_keywords
def fused_top_k_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor | None = None,
    *,
    tail: str = "bucket",
    linear_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    alpha: float = 1.0,
    scale_by_temperature: bool = False,
    ignore_index: int | Collection[int] | None = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    memory_budget: int | str | None = None,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """The divergence from a teacher of whom the K likeliest classes of every token are known.

    Equivalent, with the defaults, q the student's softmax and p the teacher's K probabilities, to:

        p, q = [*p, 1 - sum(p)], [*q[teacher_ids], 1 - sum(q[teacher_ids])]
        sum(p * (log p - log q))

    Args:
        input: the student's hidden states, (..., D); float16, bfloat16, float32 or float64.
        linear_weight: the student's head, (V, D), of input's dtype (any, under autocast).
        teacher_ids: (..., K), int64; different classes in [0, V) for a token.
        teacher_log_probs: (..., K), floating; natural logarithms of their probabilities, at the `temperature` given.
        tail: "bucket" takes all other classes for one more, on both sides; "renormalise" leaves them out, and divides
            both sides' probabilities by their sum over the K classes.
        linear_bias: (V).

    All other arguments are those of `fused_linear_distillation_loss`.

    Returns:
        What `fused_distillation_loss` returns. Differentiable in input, linear_weight and linear_bias.

    Raises:
        IndexError: a teacher_id that is not in [0, V), on CPU. On CUDA, an asynchronous device assertion.
        ValueError: a log-probability above 0 (on CUDA, a device assertion); an unknown tail; what
            `fused_linear_distillation_loss` raises.

    Examples:
        >>> h, w = torch.ones(1, 2), torch.zeros(4, 2)
        >>> half = torch.tensor([[0.5, 0.25]]).log()
        >>> fused_top_k_distillation_loss(h, w, torch.tensor([[0, 1]]), half)
        tensor(0.1733)
    """
    refuse_process_group(process_group)
    refuse_kernels(backend)
    V = _check_student(input, linear_weight, linear_bias)
    check_top_k(teacher_ids, teacher_log_probs, input, V)
    ids = ignored_ids(ignore_index)
    options = DistillationOptions(
        LossOptions(ids[0], softcap=softcap, logit_scale=logit_scale), divergence, beta, temperature, alpha,
        scale_by_temperature, tail=tail,
    ).checked()  # fmt: skip
    reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype).checked()
    refuse_transforms(input, linear_weight, linear_bias)
    targets = _targets(input, target, token_weight, ids, V, options)
    teacher = Side(*_constant(teacher_log_probs.flatten(0, -2), teacher_ids.flatten(0, -2), None))
    student = Side(input.flatten(0, -2), linear_weight, linear_bias)
    dtype = _product_dtype(input)
    settings = Settings(bool(return_stats), dtype, dtype, budget_bytes(memory_budget))
    return _of_hidden_states(student, teacher, targets, settings, options, reducing, input)


def _check_student(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> int:
    """The number of classes, if the student's hidden states and head fit."""
    rows = torch.empty(input.shape[:-1], dtype=torch.int64, device=input.device) if isinstance(input, Tensor) else input
    V = check_linear(input, linear_weight, rows, linear_bias, None).classes
    if linear_weight.dim() != 2:
        raise RuntimeError(f"linear_weight: expected shape (V, D), got {tuple(linear_weight.shape)}")
    return V


def _constant(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def _product_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a matrix product with these hidden states."""
    dtype = input.dtype
    if autocasts(input.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    return operand_dtype(dtype, input.device)


def _targets(
    input: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    ids: tuple[int, ...],
    classes: int,
    options: DistillationOptions,
) -> Targets:
    """The rows that are kept, and their hard labels."""
    shape = input.shape[:-1]
    check_target(target, shape, input.device, options.alpha)
    check_token_weight(token_weight, shape, input.device)
    if target is None:
        some = 0 if ids[0] != 0 else 1  # any class that is not ignored
        target = torch.full(shape, some, dtype=torch.int64, device=input.device)
        ids = ids[:1]
    sizes = Sizes(shape, classes, torch.Size())
    targets = prepare_targets(target, token_weight, ids, sizes, acc=acc_dtype(input.dtype), with_stats=False)
    if options.alpha < 1.0 and is_plain(input):
        check_targets(targets.target, targets.ignored, classes)
    return targets


def _of_hidden_states(
    student: Side,
    teacher: Side,
    targets: Targets,
    settings: Settings,
    options: DistillationOptions,
    reduction: ReductionOptions,
    input: Tensor,
) -> Any:
    """The loss of the kept rows, which are the only ones in matrix products unless nobody may wait for their number."""
    scale = None if reduction.reduction == "none" else scales(targets, reduction, 0.0, None)
    factor, kept, target = None if scale is None else scale.loss, None, targets.target
    if may_wait(input):
        kept = targets.kept.nonzero().squeeze(1)
        if len(kept) == len(target):
            kept = None
    else:
        student = student._replace(h=torch.where(targets.kept.unsqueeze(1), student.h, 0.0))
    if kept is not None:
        student, teacher, target = student.of(kept), teacher.of(kept, bool(options.tail)), target.index_select(0, kept)
        factor = None if factor is None else factor.index_select(0, kept)
    at_once = factor is not None and settings.dtype != torch.float16 and input.dtype != torch.float16
    value, rows = of_hidden.distilled(at_once, student, teacher, target, factor, settings, options)

    def spread(values: Tensor) -> Tensor:
        if kept is None or not len(values):
            return values
        return values.new_zeros(len(targets.target)).index_copy(0, kept, values)

    if scale is None:
        value = spread(value)
        loss = row_losses(value, value, targets, 0.0)
    else:
        loss = value if at_once else (value * factor).sum()
        loss = loss if scale.nothing is None else loss + scale.nothing
    return _result(loss, rows, targets, reduction, input, spread)


def _result(
    loss: Tensor, rows: DistilledRows, targets: Targets, reduction: ReductionOptions, input: Tensor, spread: Any
) -> Tensor | tuple[Tensor, LossStats]:
    """What the caller gets."""
    loss = finished(loss, targets, reduction, loss_dtype_of(reduction.loss_dtype, input, targets.target, None))
    if not reduction.return_stats:
        return loss
    lse, predicted, entropy = spread(rows.lse), spread(rows.predicted), spread(rows.entropy)
    return loss, statistics(targets, reduction, lse, predicted, entropy)
