"""Distillation: the divergence of a student's distribution from a teacher's, of logits or from hidden states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..backends.choice import choose
from ..core.distillation import (
    DistillationOptions,
    check_same_classes,
    check_teacher,
    check_teacher_head,
    refuse_process_group,
)
from ..core.eager import refuse_transforms
from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_logits_dtype, ignored_ids
from ..core.reduction import LossStats, row_losses, scales
from ..core.tensors import check_floating, rows_of
from ..core.unknown_keywords import explains_keywords
from ..linear.distillation import Settings, Side
from ..linear.distillation_problem import (
    check_student,
    constant,
    loss_of_hidden_states,
    product_dtype,
    result_of,
    targets_of,
)
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
        softcap: the student's logits used are `softcap * tanh(logit_scale * x / softcap)`; None for no cap.
        logit_scale: factor on the student's logits, before the cap.
        teacher_softcap: the same for the teacher.
        teacher_logit_scale: the same for the teacher.
        token_weight: (...), floating; multiplies each token's loss and enters the divisor of "mean".
        normalizer: number or 0-d tensor that divides the sum in place of the count; with reduction="mean" only.
        return_stats: also return `LossStats` of the student, detached.
        loss_dtype: the dtype of the loss; None is input's, float32 under autocast.
        process_group: not supported yet.
        backend: "auto" (Triton for CUDA tensors, else PyTorch), "triton" or "torch".

    Returns:
        The loss in nats: a scalar, or of shape (...) for "none". With return_stats, (loss, LossStats).

    Raises:
        ValueError: shapes or vocabularies that differ; a temperature that is not above 0; alpha or beta out of range;
            alpha below 1 without target.
        IndexError: with alpha below 1, a target that is neither ignored nor in [0, V).
        NotImplementedError: a process_group.

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
    targets = targets_of(input, target, token_weight, ids, V, options)
    rows = of_logits.distilled(
        input, teacher_input.detach(), targets.target, bool(return_stats), choose(backend, input.device), options
    )
    if reduction == "none":
        loss = row_losses(rows.loss, rows.loss, targets, 0.0)
    else:
        scale = scales(targets, reducing, 0.0, None)
        loss = (rows.loss * scale.loss).sum()
        loss = loss if scale.nothing is None else loss + scale.nothing
    return result_of(loss, rows, targets, reducing, input, lambda values: values)


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
    logits_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """`fused_distillation_loss` from the hidden states of both sides, whose logits exist for some tokens at a time.

    Equivalent to:

        logits = F.linear(input, linear_weight, linear_bias)
        fused_distillation_loss(logits, F.linear(teacher_input, teacher_weight, teacher_bias), target, ...)

    Args:
        input: the student's hidden states, (..., D); float16, bfloat16, float32 or float64.
        linear_weight: the student's head, (V, D), of input's dtype (any, under autocast).
        teacher_input: the teacher's hidden states, (..., E), whose size E may differ from D. A constant.
        teacher_weight: the teacher's head, (V, E), of teacher_input's dtype. A constant.
        target: class indices (...), int64 or uint8, or None if no token is ignored. Tokens whose target is ignored take
            part in no matrix product. With alpha below 1, the others are hard labels, too.
        linear_bias: (V).
        teacher_bias: (V).
        divergence: "forward_kl", "reverse_kl" or "jsd", as in `fused_distillation_loss`.
        beta: of "jsd"; above 0 and below 1.
        temperature: divides the used logits of both sides; a number above 0.
        alpha: the loss of a token is alpha * divergence + (1 - alpha) * cross entropy, from the same logits.
        scale_by_temperature: multiply the divergence by temperature**2.
        ignore_index: a class id, or a collection of them, in or out of [0, V); None means -100.
        reduction: "mean" (over the kept tokens), "sum" or "none".
        softcap: the student's logits used are `softcap * tanh(logit_scale * x / softcap)`; None for no cap.
        logit_scale: factor on the student's logits, before the cap.
        teacher_softcap: the same for the teacher.
        teacher_logit_scale: the same for the teacher.
        token_weight: (...), floating; multiplies each token's loss and enters the divisor of "mean".
        normalizer: number or 0-d tensor that divides the sum in place of the count; with reduction="mean" only.
        memory_budget: bytes of scratch beside the gradients, an int or a string such as "512MiB"; None for chunks of
            tokens whose logits take 512 MiB, and of 256 tokens at least.
        logits_dtype: torch.float32 for logits of 16-bit operands that are never rounded to 16 bits; None rounds them as
            `F.linear` does.
        return_stats: also return `LossStats` of the student, detached.
        loss_dtype: the dtype of the loss; None is input's, float32 under autocast.
        process_group: not supported yet.
        backend: "auto" (Triton for CUDA tensors, else PyTorch), "triton" or "torch".

    Returns:
        What `fused_distillation_loss` returns. Differentiable in input, linear_weight and linear_bias.

    Raises:
        ValueError: what `fused_distillation_loss` raises; a memory_budget that is too small; the message names the
            smallest that works.
        RuntimeError: operands whose shapes or dtypes do not fit.

    Note:
        Ignored tokens take part in no matrix product of either side. A scalar loss computes its gradients in forward
        (three products for the student, one for the teacher) and scales them in backward; reduction="none" and float16
        compute them in backward, from logits computed again. On CUDA, the host waits for every block of tokens. Under
        torch.compile, ignored rows then remain in the products as zeros.

    Examples:
        >>> h, w = torch.ones(3, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> fused_linear_distillation_loss(h, w, torch.ones(3, 5), torch.zeros(4, 5)).item()
        0.0
    """
    refuse_process_group(process_group)
    V = check_student(input, linear_weight, linear_bias)
    check_teacher("teacher_input", teacher_input, input)
    check_teacher_head(teacher_input, teacher_weight, teacher_bias, V)
    ids = ignored_ids(ignore_index)
    options = DistillationOptions(
        LossOptions(ids[0], softcap=softcap, logit_scale=logit_scale), divergence, beta, temperature, alpha,
        scale_by_temperature, teacher_softcap, teacher_logit_scale,
    ).checked()  # fmt: skip
    reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype).checked()
    check_logits_dtype(logits_dtype, input.dtype)
    refuse_transforms(input, linear_weight, linear_bias)
    targets = targets_of(input, target, token_weight, ids, V, options)
    teacher = constant(rows_of(teacher_input), teacher_weight, teacher_bias)
    student = Side(rows_of(input), linear_weight, linear_bias)
    dtypes, chosen = (product_dtype(input), product_dtype(teacher_input)), choose(backend, input.device)
    settings = Settings(bool(return_stats), *dtypes, logits_dtype, budget_bytes(memory_budget), chosen)
    return loss_of_hidden_states(student, teacher, targets, settings, options, reducing, input)
