"""`IgnoreTokens` sets labels to -100 before a trainer counts them, around any collator."""

import functools

import pytest
import torch

from fused_ignore_ce.hf import IgnoreTokens, patch_model

from ..helpers.hf_worker import PAD, assert_same, examples, llama
from ..helpers.trainer_runs import logged, train


def stacked(features):
    return torch.utils.data.default_collate(features)


def test_ignored_ids_under_accumulation(tmp_path):
    """The trainer counts labels that are not -100. Without IgnoreTokens, which sets them, there is an error."""
    recipe = {"max_steps": 3, "gradient_accumulation_steps": 2}
    with_ids = {"data": examples(24, ignored=PAD), "data_collator": IgnoreTokens(stacked, PAD)}
    expected = train(llama(), tmp_path, recipe, data_collator=stacked)
    ours = train(patch_model(llama(), ignore_index=PAD), tmp_path, recipe, **with_ids)
    for name in ("loss", "grad_norm"):
        assert_same(logged(ours, name), logged(expected, name))
    with pytest.raises(ValueError, match=r"num_items_in_batch.*IgnoreTokens\(collator, ids\)"):
        train(patch_model(llama(), ignore_index=PAD), tmp_path, recipe, **with_ids | {"data_collator": stacked})


def test_the_wrapped_collator():
    collator = IgnoreTokens(lambda features, scale=1: {"shift_labels": scale * features, "x": features}, [2, 4])
    features = torch.tensor([[1, 2, 3]])
    batch = collator(features, scale=2)
    assert batch["shift_labels"].tolist() == [[-100, -100, 6]]
    assert batch["x"] is features
    assert features.tolist() == [[1, 2, 3]]
    assert IgnoreTokens(functools.partial(stacked), 3).func is stacked  # attributes are the wrapped collator's
    for collator, message in ((lambda _: {"labels": [1]}, "list"), (lambda _: {"labels": torch.ones(2)}, "float32")):
        with pytest.raises(TypeError, match=f"labels: expected an integer tensor.*{message}"):
            IgnoreTokens(collator, 0)([])
    with pytest.raises(ValueError, match="labels.*got \\['x'\\]"):
        IgnoreTokens(lambda _: {"x": 1}, 0)([])
    with pytest.raises(TypeError, match="collator"):
        IgnoreTokens(None, 0)
    with pytest.raises(ValueError, match="ignore_index"):
        IgnoreTokens(stacked, [])
