"""The loss that transformers models call: `model.loss_function = fused_causal_lm_loss`."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .functional import fused_cross_entropy, row_loss

#: Options of `fused_cross_entropy` that this loss sets itself.
_SET_HERE = {"input", "target", "ignore_index", "normalizer"}
_OPTIONS = tuple(name for name in inspect.signature(fused_cross_entropy).parameters if name not in _SET_HERE)
_MINE = (*_OPTIONS, "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")


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

    Equivalent to::

        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]         # unless shift_labels is given
        loss = F.cross_entropy(logits.float().view(-1, vocab_size), labels.view(-1), reduction="sum")
        loss = loss / num_items_in_batch                                    # or the number of kept labels

    without the float32 copy of the logits.

    Args:
        logits: (..., T, V), floating; any strides, so that slices are not copied.
        labels: (..., T) int64, not shifted. Not read when shift_labels is given.
        vocab_size: V, if given; with a process_group, of the whole vocabulary, and not checked.
        num_items_in_batch: number or one-element tensor to divide the sum by; None divides by the kept labels.
        ignore_index: an id or a collection of ids; position t is ignored if label t + 1 is one of them.
        shift_labels: (..., T) int64, already shifted.
        loss_options: options of `fused_cross_entropy`. A `token_weight` is shifted as the labels are. Other
            keywords are what a model's forward hands on (attention metadata and the like) and are not read, but
            one that nearly spells an option is a TypeError.

    Returns:
        The loss in nats, a float32 scalar (float64 for float64 logits); target-shaped for reduction="none".

    Raises:
        TypeError: a misspelled option.
        ValueError: labels whose shape is not that of logits without its last dimension, or another vocab_size.
        IndexError: as `fused_cross_entropy`.
    """
    options = _known_options(loss_options)
    ids = arguments.ignored_ids(ignore_index)
    targets = shift_labels if shift_labels is not None else labels
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
        raise TypeError(
            f"logits and labels (or shift_labels): expected Tensors, got {type(logits).__name__} and "
            f"{type(targets).__name__}"
        )
    process_group = options.pop("process_group", None)
    tensors = (logits, targets, options.pop("weight", None), options.pop("token_weight", None))
    options |= {"num_items_in_batch": num_items_in_batch, "ids": ids, "shifted": shift_labels is not None}
    if arguments.is_distributed(process_group, *tensors):
        from .dtensor import local_logits

        return local_logits(_loss, process_group, *tensors, classes_dim=-1, vocab_size=None, **options)
    return _loss(*tensors, vocab_size=vocab_size, **options)


def _loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    vocab_size: int | None,
    num_items_in_batch: float | Tensor | None,
    ids: tuple[int, ...],
    shifted: bool,
    **options: Any,
) -> Any:
    *lead, T, V = logits.shape if logits.dim() > 1 else (1, *logits.shape)
    if vocab_size is not None and vocab_size != V:
        raise ValueError(f"vocab_size: expected the last dimension of logits, {V}, got {vocab_size}")
    targets = targets.to(logits.device)
    if not shifted:
        targets = _next(targets, ids[0])
        token_weight = None if token_weight is None else _next(token_weight, 0.0)
    positions = math.prod(lead) * T
    if targets.numel() != positions:
        raise ValueError(
            f"labels: expected shape {tuple(logits.shape[:-1])}, as logits without its last dimension, got "
            f"{tuple(targets.shape)}"
        )
    # As in transformers, only the number of positions has to agree.
    x = logits.reshape(math.prod(lead), T, V)
    index = targets.reshape(x.shape[:2])
    arguments.check_cross_entropy(x.movedim(-1, 1), index, weight, weight_dtype=torch.float32)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.reshape(()).to(logits.device)
    return row_loss(
        x,
        index,
        weight,
        shape=targets.shape,
        out_dtype=torch.promote_types(logits.dtype, torch.float32),
        ignore_index=ids,
        token_weight=token_weight,
        normalizer=num_items_in_batch,
        **options,
    )


def _next(t: Tensor, last: float) -> Tensor:
    """Position t holds what was at t + 1; the last one holds `last`."""
    return torch.nn.functional.pad(t, (0, 1), value=last)[..., 1:]


def _known_options(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in _OPTIONS and (meant := _nearly_spelled(name)):
            raise TypeError(f"fused_causal_lm_loss() got an unexpected option {name!r}; did you mean {meant!r}?")
    return {name: value for name, value in given.items() if name in _OPTIONS}


def _nearly_spelled(name: str) -> str:
    return next(iter(difflib.get_close_matches(name, _MINE, n=1, cutoff=0.8)), "")


# difflib cannot be traced. This is all that torch.compiler.assume_constant_result does, but that would import the
# compiler, and with it Triton, for everybody.
_nearly_spelled._dynamo_marked_constant = True  # type: ignore[attr-defined]
