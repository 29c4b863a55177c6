"""Inputs and labels for any model's forward, from the names of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .tiny import NUM_LABELS, PLAIN_IDS, SPECIAL_IDS

ROWS, TOKENS, CHOICES = 3, 16, 2
IGNORED = -100


def batches(model: Any, mapping: str, overrides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Batches that the model may want, from few arguments to many. The first that its forward accepts will do.

    `overrides` has arguments by name: (kind, *arguments) for a tensor of one of _KINDS, or None to leave it out.
    """
    taken = inspect.signature(model.forward).parameters
    torch.manual_seed(1)
    given = {name: value and _KINDS[value[0]](*value[1:]) for name, value in overrides.items()}
    text = "input_ids" in taken and mapping != "SPEECH_SEQ_2_SEQ"
    main = "input_ids" if text else model.main_input_name
    ladder: tuple[list[str], ...] = ([], [*_MASKS], ["decoder_input_ids"], ["pixel_values"], [*_INPUTS])
    for names in dict.fromkeys(frozenset({main, *more} & {*taken} & {*_INPUTS}) for more in ladder):
        batch = {name: make(model.config) for name, make in _INPUTS.items() if name in names} | given
        if mapping == "SEQUENCE_CLASSIFICATION" and model.config.is_encoder_decoder:
            batch["input_ids"][:, -1] = model.config.eos_token_id  # where the classifier reads
        batch |= _labels(taken, mapping, batch)
        yield {name: value for name, value in batch.items() if value is not None}


def _ids(*shape: int) -> Tensor:
    return torch.randint(PLAIN_IDS, SPECIAL_IDS, shape or (ROWS, TOKENS))


def _field(config: Any, *names: str, default: int) -> int:
    """The first of these fields that the configuration or one of its parts has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return default


def _pixels(config: Any) -> Tensor:
    size = _field(config, "image_size", default=32)
    return torch.randn(ROWS, _field(config, "num_channels", "in_channels", default=3), size, size)


def _features(config: Any) -> Tensor:
    mels = _field(config, "num_mel_bins", "input_feat_per_channel", "input_feat_size", default=32)
    frames = 2 * _field(config, "max_source_positions", default=32)
    return torch.randn(ROWS, mels, frames)


_MASKS: dict[str, Callable[[Any], Tensor]] = {
    "attention_mask": lambda _: torch.ones(ROWS, TOKENS, dtype=torch.long),
    "token_type_ids": lambda _: torch.zeros(ROWS, TOKENS, dtype=torch.long),
    "mm_token_type_ids": lambda _: torch.zeros(ROWS, TOKENS, dtype=torch.long),
}
_INPUTS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": lambda _: _ids(),
    **_MASKS,
    "decoder_input_ids": lambda _: _ids(),
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": lambda _: torch.randn(ROWS, 4000),
    "bbox": lambda _: torch.tensor([1, 2, 5, 7]).expand(ROWS, TOKENS, 4),
    "image": _pixels,
}


def _labels(taken: Mapping[str, Any], mapping: str, batch: dict[str, Any]) -> dict[str, Any]:
    """Labels, some of them ignored. For multiple choice, also the inputs, with a dimension for the choices."""
    if "labels" in batch:
        return {}
    if "start_positions" in taken and mapping == "QUESTION_ANSWERING":
        late = TOKENS + 9  # clamped to the length, which is the ignored index there
        return {"start_positions": torch.tensor([1, late, 4]), "end_positions": torch.tensor([3, 6, late])}
    if mapping == "SEQUENCE_CLASSIFICATION":
        return {"labels": torch.tensor([1, IGNORED, NUM_LABELS - 1])}
    if mapping == "MULTIPLE_CHOICE":
        choices = {k: v.unsqueeze(1).repeat_interleave(CHOICES, 1) for k, v in batch.items() if isinstance(v, Tensor)}
        if "input_ids" in choices:
            choices["input_ids"] = _ids(ROWS, CHOICES, TOKENS)
        return {**choices, "labels": torch.tensor([1, IGNORED, 0])}
    if mapping == "TOKEN_CLASSIFICATION":
        return {"labels": _ignoring(torch.randint(NUM_LABELS, (ROWS, TOKENS)))}
    return {"labels": _ignoring(_ids())}


def _ignoring(labels: Tensor) -> Tensor:
    labels[:, :3] = IGNORED
    labels[0, -5:] = IGNORED
    return labels


_KINDS: dict[str, Callable[..., Tensor]] = {
    "floats": torch.randn,
    "zeros": torch.zeros,
    "ones": torch.ones,
    "ids": _ids,
    "labels": lambda *shape: _ignoring(_ids(*shape)),
    "images": lambda token, count: _ids().index_fill(1, torch.arange(count), token),
    "first": lambda count: (torch.arange(TOKENS) < count).expand(ROWS, -1).long(),
}
