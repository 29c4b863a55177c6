"""`fused_linear_log_probs`: log-probabilities and entropies from hidden states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.options import LossOptions, ReductionOptions, check_temperature, ignored_ids
from ..core.tensors import LinearTensors, check_indices, holds_probabilities
from ..core.unknown_keywords import explains_keywords
from ..distributed.shards import local_linear
from ..linear.problem import linear_problem


@explains_keywords
def fused_linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | Collection[int] | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    memory_budget: int | str | None = None,
    logits_dtype: torch.dtype | None = None,
    return_entropy: bool = False,
    return_stats: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Any:
    """Log-probabilities of the targets, for preference and policy-gradient training.

    Equivalent to:

        F.linear(input, linear_weight, linear_bias).float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)

    with 0 at ignored targets.

    Args:
        input: hidden states, (D) or (..., D); float16, bfloat16, float32 or float64.
        linear_weight: (C, D), of input's dtype (any, under autocast).
        target: class indices, (...), int64 or uint8.
        linear_bias: (C).
        ignore_index: a class id, or a collection of them, in or out of [0, C); None means -100.
        softcap: the logits used are `softcap * tanh(logit_scale * x / softcap) / temperature`; None for no cap.
        logit_scale: factor on the logits, before the cap.
        temperature: divides the logits after the cap, as samplers do; a number above 0.
        token_weight: (...), floating; multiplies each row's log-probability.
        memory_budget: bytes of scratch beside the gradients, as in `fused_linear_cross_entropy`.
        logits_dtype: torch.float32 for logits of 16-bit operands that are never rounded to 16 bits, so that
            log-probabilities agree with an inference engine whose head is float32; None rounds them as `F.linear` does.
        return_entropy: also return the entropy of the distribution of every row.
        return_stats: also return `LossStats`.
        process_group: the vocabulary is sharded over this group, as in `fused_linear_cross_entropy`.
        backend: "auto", "triton" or "torch".

    Returns:
        (...) in nats, float32 (float64 for float64 input), differentiable in input, linear_weight and linear_bias.
        With return_entropy, (log_probs, entropy), both differentiable: the gradient of a row's entropy H with respect
        to its logits is `-p * (log(p) + H)`. With return_stats, LossStats come last, detached.

    Raises:
        ValueError: a temperature that is not above 0.
        IndexError, TypeError, ValueError: what `fused_linear_cross_entropy` raises for the same mistake.

    Examples:
        >>> fused_linear_log_probs(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
        tensor([-1.3863,  0.0000])
    """
    tensors = LinearTensors(input, linear_weight, target, linear_bias, None, token_weight)
    with local_linear(process_group, tensors) as (group, tensors):
        if isinstance(target, Tensor) and holds_probabilities(target):
            check_indices(target)
        check_temperature(temperature)
        ids = ignored_ids(ignore_index)
        cap = None if softcap is None else softcap / temperature
        options = LossOptions(ids[0], softcap=cap, logit_scale=logit_scale / temperature).checked()
        with_stats: bool | Literal["differentiable"] = "differentiable" if return_entropy else return_stats
        acc = torch.float64 if input.dtype == torch.float64 else torch.float32
        reducing = ReductionOptions("none", None, with_stats, acc).checked()
        problem = linear_problem(tensors, ids, options, reducing, memory_budget, logits_dtype, backend, group)
    found = problem.loss()
    if not with_stats:
        return 0.0 - found  # not -found: that is -0.0 at ignored rows
    loss, stats = found
    results = (0.0 - loss, stats.entropy) if return_entropy else (0.0 - loss,)
    if return_stats:
        results = (*results, stats._replace(lse=stats.lse.detach(), entropy=stats.entropy.detach()))
    return results
