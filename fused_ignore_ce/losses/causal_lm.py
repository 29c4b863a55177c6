"""Next-token losses: of logits, with the signature that transformers models call, and of hidden states."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from typing_extensions import Unpack

from ..core.eager import overridden
from ..core.options import CausalLMKeywords, LinearCausalLMKeywords, LossOptions, ReductionOptions, ignored_ids
from ..core.reduction import LossStats
from ..core.tensors import LogitsTensors, check_tensor, check_token_weight
from ..core.unknown_keywords import explains_keywords, meaning, unknown_keyword
from ..distributed.shards import local_logits
from ..logits.problem import logits_problem
from ..logits.ways import way_of
from .linear_cross_entropy import fused_linear_cross_entropy

#: The keywords that `fused_causal_lm_loss` reads. Models hand others on to their loss function too.
_KNOWN = (*CausalLMKeywords.__optional_keys__, "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")


def fused_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int | Collection[int] = -100,
    shift_labels: Tensor | None = None,
    **loss_options: Any,
) -> Any:
    """Next-token loss with the signature and the result of transformers' `ForCausalLMLoss`.

    Equivalent to:

        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]         # unless shift_labels is given
        loss = F.cross_entropy(logits.float().view(-1, vocab_size), labels.view(-1), reduction="sum")
        loss = loss / num_items_in_batch                                    # or the number of kept labels

    without the float32 copy of the logits.

    Args:
        logits: (..., T, V), floating; any strides, so that slices are not copied.
        labels: (..., T) int64, not shifted. Not read when shift_labels is given.
        vocab_size: V, if given; with a process_group, that of the whole vocabulary, which is not checked.
        num_items_in_batch: number or one-element tensor to divide the sum by; None divides by the kept labels.
        ignore_index: an id or a collection of ids; position t is ignored if label t + 1 is one of them.
        shift_labels: (..., T) int64, already shifted.
        loss_options: options of `fused_cross_entropy`. A `token_weight` is shifted as the labels are. Other
            keywords are what a model's forward hands on (attention metadata and the like) and are not read, but
            one that nearly spells an option is a TypeError.

    Returns:
        The loss in nats, a float32 scalar (float64 for float64 logits) unless `loss_dtype` says otherwise; shaped as
        the labels for reduction="none". With return_stats, (loss, LossStats).

    Raises:
        TypeError: a misspelled option.
        ValueError: labels whose shape is not that of logits without its last dimension, or another vocab_size.
        IndexError: as `fused_cross_entropy`.
    """
    given = _known_options(loss_options)
    targets = shift_labels if shift_labels is not None else labels
    check_tensor("logits", logits)
    targets = _checked_labels(targets)
    if overridden(logits):
        return handle_torch_function(
            fused_causal_lm_loss, (logits,), logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels,
            **given,
        )  # fmt: skip
    tensors = LogitsTensors(logits, targets, given.get("weight"), given.get("token_weight"))
    with local_logits(given.get("process_group"), tensors, classes_dim=-1) as (group, tensors):
        ids = ignored_ids(ignore_index)
        options = LossOptions(
            ids[0],
            given.get("label_smoothing", 0.0),
            given.get("softcap"),
            given.get("logit_scale", 1.0),
            given.get("z_loss", 0.0),
        ).checked()
        reducing = ReductionOptions(
            given.get("reduction", "mean"),
            as_normalizer(num_items_in_batch, tensors.input.device),
            given.get("return_stats", False),
            given.get("loss_dtype") or torch.promote_types(logits.dtype, torch.float32),
            given.get("zero_if_all_ignored", False),
        ).checked()
        if group is None:
            check_vocab_size(vocab_size, logits)
        tensors, shape = aligned_with_logits(tensors, ids[0], shifted=shift_labels is not None)
        problem = logits_problem(
            tensors, ids, options, reducing, given.get("backend", "auto"), group,
            classes_dim=-1,
            inplace_backward=given.get("inplace_backward", False),
            grad_in_forward=given.get("grad_in_forward", False),
        )  # fmt: skip
    problem = problem._replace(targets=problem.targets._replace(shape=shape))
    return way_of(problem).loss(problem)


@functools.partial(explains_keywords, also=LinearCausalLMKeywords.__optional_keys__)
def fused_linear_causal_lm_loss(
    hidden_states: Tensor,
    linear_weight: Tensor,
    labels: Tensor | None,
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: Tensor | None = None,
    *,
    ignore_index: int | Collection[int] = -100,
    token_weight: Tensor | None = None,
    return_stats: bool | Literal["differentiable"] = False,
    **options: Unpack[LinearCausalLMKeywords],
) -> Tensor | tuple[Tensor, LossStats]:
    """Next-token loss from hidden states and the head's weight, without logits.

    Equivalent to:

        fused_causal_lm_loss(F.linear(hidden_states, linear_weight), labels, None, num_items_in_batch, ...)

    Position t is scored against label t + 1 by shifting the labels. The hidden states are not sliced, which would copy
    them. Instead, the last positions are ignored, and dropped with all other ignored positions.

    Args:
        hidden_states: (..., T, D), floating.
        linear_weight: (V, D), the head's weight, which may be tied to the embeddings.
        labels: (..., T) int64, not shifted. Not read when shift_labels is given.
        num_items_in_batch: number or one-element tensor to divide the sum by; None divides by the kept labels.
        shift_labels: (..., T) int64, already shifted.
        ignore_index: an id or a collection of ids; position t is ignored if label t + 1 is one of them.
        token_weight: (..., T) floating, shifted as the labels are.
        return_stats: as in `fused_linear_cross_entropy`.
        options: other options of `fused_linear_cross_entropy`.

    Returns:
        The loss in nats, a float32 scalar (float64 for float64 hidden states) unless `loss_dtype` says otherwise;
        shaped as the labels for reduction="none". With return_stats, (loss, LossStats).

    Raises:
        TypeError: labels that are no tensor.
        ValueError, IndexError: as `fused_linear_cross_entropy`.

    Examples:
        >>> hidden, head = torch.zeros(1, 3, 2), torch.zeros(5, 2)
        >>> fused_linear_causal_lm_loss(hidden, head, torch.tensor([[4, 2, -100]])).item()
        1.6094379425048828
    """
    targets = shift_labels if shift_labels is not None else labels
    targets = _checked_labels(targets)
    ids = ignored_ids(ignore_index)
    targets = targets.to(hidden_states.device)
    if shift_labels is None:
        targets = _next(targets, ids[0])
        token_weight = None if token_weight is None else _next(token_weight, 0.0)
    if options.get("loss_dtype") is None:
        options["loss_dtype"] = torch.promote_types(hidden_states.dtype, torch.float32)
    return fused_linear_cross_entropy(
        hidden_states,
        linear_weight,
        targets,
        ignore_index=ids,
        token_weight=token_weight,
        normalizer=as_normalizer(num_items_in_batch, hidden_states.device),
        return_stats=return_stats,
        **options,
    )


def _checked_labels(labels: Any) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, here or as shift_labels, got {type(labels).__name__}")
    return labels


def check_vocab_size(vocab_size: int | None, logits: Tensor) -> None:
    if vocab_size is not None and vocab_size != logits.shape[-1]:
        raise ValueError(f"vocab_size: expected the last dimension of logits, {logits.shape[-1]}, got {vocab_size}")


def as_normalizer(num_items_in_batch: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.reshape(()).to(device)
    return num_items_in_batch


def aligned_with_logits(tensors: LogitsTensors, ignored: int, *, shifted: bool) -> tuple[LogitsTensors, torch.Size]:
    """Shifts labels and token weights and shapes them as the logits' rows; also returns the shape of the labels."""
    logits, targets, weight, token_weight = tensors
    targets = targets.to(logits.device)
    if not shifted:
        targets = _next(targets, ignored)
        token_weight = None if token_weight is None else _next(token_weight, 0.0)
    rows = logits.shape[:-1]
    if targets.numel() != math.prod(rows):
        raise ValueError(
            f"labels: expected shape {tuple(rows)}, as logits without its last dimension, got {tuple(targets.shape)}"
        )
    check_token_weight(token_weight, targets.shape, logits.device)
    # As in transformers, only the number of positions has to agree.
    token_weight = None if token_weight is None else token_weight.reshape(rows)
    return LogitsTensors(logits, targets.reshape(rows), weight, token_weight), targets.shape


def _next(t: Tensor, last: float) -> Tensor:
    """Shifts by one position: position t gets the value at t + 1, the last position gets `last`."""
    return torch.nn.functional.pad(t, (0, 1), value=last)[..., 1:]


def _known_options(given: dict[str, Any]) -> CausalLMKeywords:
    for name in given:
        if name not in _KNOWN and _means_an_option(name):
            raise TypeError(unknown_keyword("fused_causal_lm_loss", name, _KNOWN))
    return cast(CausalLMKeywords, {name: given[name] for name in given if name in CausalLMKeywords.__optional_keys__})


def _means_an_option(name: str) -> bool:
    return meaning(name, _KNOWN) is not None


_means_an_option._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark that Dynamo reads, as on `unknown_keyword`
