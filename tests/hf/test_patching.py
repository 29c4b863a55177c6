"""`patch_model` and `patch_transformers` reach the models that they are meant for, and leave no trace."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.hf import patch_model, patch_transformers, unpatch_model, unpatch_transformers

from ..helpers.hf_tiny import D, V, assert_same, batch, llama, step, transformers


def test_an_exception_in_the_forward_leaves_nothing_behind():
    model = patch_model(llama())
    before = torch._C._len_torch_function_stack()
    with pytest.raises(IndexError):
        model(input_ids=batch()["input_ids"], labels=torch.full((2, 9), V + 3))
    assert torch._C._len_torch_function_stack() == before
    assert not model.lm_head._forward_pre_hooks
    assert type(F.linear(torch.ones(2, D), model.lm_head.weight)) is torch.Tensor


def test_layers_run_without_a_torch_function_mode():
    """A mode costs a Python call per operation. It is active in the first forward only, in which the head is called."""
    model, seen = patch_model(llama()), []
    model(**batch())
    before = torch._C._len_torch_function_stack()
    layer, head = model.model.layers[0], model.lm_head
    for module in (layer, head):
        module.register_forward_hook(lambda *_: seen.append(torch._C._len_torch_function_stack()))
    model(**batch())
    assert seen == [before] * 3  # the head is called for its logits and for the loss


def test_models_of_other_threads_are_not_touched():
    model, other = patch_model(llama()), llama()
    found = []

    def run(*_):
        thread = threading.Thread(target=lambda: found.append(type(other(**batch()).logits)))
        thread.start()
        thread.join()

    model.lm_head.register_forward_hook(run)
    model(**batch())
    assert found == [torch.Tensor] * 2  # the head is called for its logits and for the loss


def test_unpatch_restores_the_model_bit_for_bit():
    model = llama()
    before, cls = dict(model.__dict__), type(model)
    unpatch_model(model)
    patch_model(model)
    patch_model(model, label_smoothing=0.1)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert unpatch_model(unpatch_model(model)) is model
    assert type(model) is cls
    assert model.__dict__ == before


def test_a_forward_set_on_the_instance_is_patched_too_and_restored(took):
    """accelerate and TRL set one."""
    model = llama()
    plain = step(model, **batch())
    original = model.forward

    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    model.forward = forward
    patch_model(model)
    assert_same(step(model, **batch()), plain)
    assert took == ["linear"]
    assert unpatch_model(model).__dict__["forward"] is forward
    del model.forward
    patch_model(model, label_smoothing=0.1)
    model.forward = lambda input_ids, labels: copy.copy(plain[0])
    with pytest.raises(RuntimeError, match="label_smoothing"):  # what takes no cross entropy cannot use the option
        model(**batch())


def test_patch_transformers_reaches_every_model_and_leaves_no_trace(took):
    old, forward = llama(), transformers.LlamaForCausalLM.forward
    define = transformers.PreTrainedModel.__dict__.get("__init_subclass__")
    plain = step(old, **batch())
    with patch_transformers():

        class Later(transformers.LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None):
                return super().forward(input_ids, labels=labels)

        for model in (old, llama(), llama(Later)):
            assert_same(step(model, **batch()), plain)
        assert took == ["linear"] * 3
        with patch_transformers(ignore_index=7):
            labels = batch()["labels"].masked_fill(batch()["labels"] == 7, -100)
            inner = step(old, **batch())
        assert_same(step(old, **batch()), plain)
        torch.testing.assert_close(inner[0].loss, copy.deepcopy(old)(batch()["input_ids"], labels=labels).loss)
    del took[:]
    assert_same(step(old, **batch()), plain)
    assert took == []
    assert transformers.LlamaForCausalLM.forward is forward
    assert transformers.PreTrainedModel.__dict__.get("__init_subclass__") == define
    unpatch_transformers()
    assert transformers.LlamaForCausalLM.forward is forward


def test_patch_transformers_reaches_a_forward_that_a_mixin_defines(took):
    cls = transformers.LlamaForSequenceClassification
    assert "forward" not in cls.__dict__
    model = llama(cls, num_labels=4, pad_token_id=0)
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([3, 1])}
    plain = step(model, **inputs)
    with patch_transformers():
        assert_same(step(model, **inputs), plain)
    assert took == ["logits"]
    assert "forward" not in cls.__dict__


def test_a_models_own_options_come_before_those_of_patch_transformers():
    model, inputs = llama(), batch()
    true = patch_model(model, label_smoothing=0.3)(**inputs).loss
    with patch_transformers(label_smoothing=0.1):
        assert torch.equal(model(**inputs).loss, true)
    assert torch.equal(model(**inputs).loss, true)
