"""`patch_transformers` reaches every model, those to come too, and leaves no trace."""

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import patch_model, patch_transformers, unpatch_transformers

from ..helpers.hf_tiny import assert_same_step, step
from ..helpers.hf_worker import PAD, MyLlama, assert_deferred, assert_same, batches, llama, spied, trajectory

STEPS = 4


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch_transformers()


def test_it_reaches_every_model_and_leaves_no_trace(monkeypatch):
    forwards = LlamaForCausalLM.forward, MyLlama.forward
    define = PreTrainedModel.__dict__.get("__init_subclass__")
    before = llama()
    expected, _ = trajectory(llama(), batches(STEPS))
    expected_own, _ = trajectory(llama(cls=MyLlama), batches(STEPS))
    spy = spied(monkeypatch)
    patch_transformers()

    class Later(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    for model in (before, llama(), llama(cls=Later)):
        losses, outputs = trajectory(model, batches(STEPS))
        assert_same(losses, expected)
        assert_deferred(outputs)
    losses, outputs = trajectory(llama(cls=MyLlama), batches(STEPS))
    assert_same(losses, expected_own)
    assert_deferred(outputs)
    assert spy.calls == 4 * STEPS

    unpatch_transformers()
    unpatch_transformers()
    assert (LlamaForCausalLM.forward, MyLlama.forward) == forwards
    assert PreTrainedModel.__dict__.get("__init_subclass__") == define
    for cls in (LlamaForCausalLM, Later, MyLlama):
        assert not isinstance(llama(cls=cls)(**batches(1)[0]).logits, DeferredLogits)
        assert isinstance(patch_model(llama(cls=cls))(**batches(1)[0]).logits, DeferredLogits)
    assert spy.calls == 4 * STEPS + 3


def test_it_reaches_a_forward_that_a_mixin_defines(took):
    cls = LlamaForSequenceClassification
    assert "forward" not in cls.__dict__
    model = llama(cls=cls, num_labels=4)
    inputs = {"input_ids": batches(1)[0]["input_ids"], "labels": torch.tensor([3, 1, 0])}
    plain = step(model, **inputs)
    with patch_transformers():
        assert_same_step(step(model, **inputs), plain)
    assert took == ["logits"]
    assert "forward" not in cls.__dict__


def test_as_a_context():
    """The inner context's options hold. A model that was patched itself keeps its own."""
    batch = batches(1, ignored=PAD)[0]
    forward, model, own = LlamaForCausalLM.forward, llama(), patch_model(llama(), ignore_index=PAD, z_loss=0.1)
    plain = model(**batch).loss
    ignoring = model(**batches(1)[0]).loss
    with patch_transformers(ignore_index=PAD):
        torch.testing.assert_close(model(**batch).loss, ignoring)
        with patch_transformers():
            torch.testing.assert_close(model(**batch).loss, plain)
        torch.testing.assert_close(model(**batch).loss, ignoring)
        ours = own(**batch).loss
    with patch_transformers(label_smoothing=0.1):
        with patch_transformers(ignore_index=PAD):
            torch.testing.assert_close(model(**batch).loss, ignoring)
        assert torch.equal(own(**batch).loss, ours)
    assert torch.equal(own(**batch).loss, ours)
    assert LlamaForCausalLM.forward is forward
    assert torch.equal(model(**batch).loss, plain)
    with pytest.raises(ZeroDivisionError), patch_transformers():
        _ = 1 / 0
    assert LlamaForCausalLM.forward is forward
