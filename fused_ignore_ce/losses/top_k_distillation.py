"""`fused_top_k_distillation_loss`: distillation from a teacher whose likeliest classes are known."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..backends.choice import choose
from ..core.distillation import (
    DistillationOptions,
    check_top_k,
    refuse_process_group,
)
from ..core.eager import refuse_transforms
from ..core.options import LossOptions, ReductionOptions, budget_bytes, check_logits_dtype, ignored_ids
from ..core.reduction import LossStats
from ..core.tensors import rows_of
from ..core.unknown_keywords import explains_keywords
from ..linear.distillation import Settings, Side
from ..linear.distillation_problem import (
    check_student,
    constant,
    loss_of_hidden_states,
    product_dtype,
    targets_of,
)


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
    logits_dtype: torch.dtype | None = None,
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
        target: class indices (...), int64 or uint8, or None if no token is ignored. Tokens whose target is ignored take
            part in no matrix product. With alpha below 1, the others are hard labels, too.
        linear_bias: (V).
        divergence: "forward_kl", "reverse_kl" or "jsd", as in `fused_distillation_loss`.
        beta: of "jsd"; above 0 and below 1.
        temperature: divides the used logits of both sides; a number above 0.
        alpha: the loss of a token is alpha * divergence + (1 - alpha) * cross entropy, from the same logits.
        scale_by_temperature: multiply the divergence by temperature**2.
        ignore_index: a class id, or a collection of them, in or out of [0, V); None means -100.
        reduction: "mean" (over the kept tokens), "sum" or "none".
        softcap: the student's logits used are `softcap * tanh(logit_scale * x / softcap)`; None for no cap.
        logit_scale: factor on the student's logits, before the cap.
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
    V = check_student(input, linear_weight, linear_bias)
    check_top_k(teacher_ids, teacher_log_probs, input, V)
    ids = ignored_ids(ignore_index)
    options = DistillationOptions(
        LossOptions(ids[0], softcap=softcap, logit_scale=logit_scale), divergence, beta, temperature, alpha,
        scale_by_temperature, tail=tail,
    ).checked()  # fmt: skip
    reducing = ReductionOptions(reduction, normalizer, return_stats, loss_dtype).checked()
    check_logits_dtype(logits_dtype, input.dtype)
    refuse_transforms(input, linear_weight, linear_bias)
    targets = targets_of(input, target, token_weight, ids, V, options)
    teacher = constant(rows_of(teacher_log_probs), rows_of(teacher_ids), None)
    student = Side(rows_of(input), linear_weight, linear_bias)
    dtype, chosen = product_dtype(input), choose(backend, input.device)
    settings = Settings(bool(return_stats), dtype, dtype, logits_dtype, budget_bytes(memory_budget), chosen)
    return loss_of_hidden_states(student, teacher, targets, settings, options, reducing, input)
