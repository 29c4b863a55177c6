"""`patch_model` reaches the model that it is given and no other, and leaves no trace."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.hf import patch_model, unpatch_model

from ..helpers.hf_tiny import D, V, assert_same_step, batch, llama, step


@pytest.mark.parametrize("wrong", ["input_ids", "labels"])
def test_an_error_in_the_forward_leaves_nothing_behind(wrong):
    """An error in the model's body, or in its loss."""
    model = patch_model(llama())
    before = torch._C._len_torch_function_stack()
    with pytest.raises(IndexError):
        model(**batch() | {wrong: torch.full((2, 9), V + 3)})
    assert torch._C._len_torch_function_stack() == before
    assert not model.lm_head._forward_pre_hooks
    assert type(F.linear(torch.ones(2, D), model.lm_head.weight)) is torch.Tensor
    assert type(F.cross_entropy(torch.randn(2, V), torch.tensor([1, 2]))) is torch.Tensor
    torch.testing.assert_close(model(**batch()).loss, llama()(**batch()).loss)


def test_layers_run_without_a_torch_function_mode():
    """A mode costs a Python call per operation. It is active in the first forward only, in which the head is called."""
    model, seen = patch_model(llama()), []
    model(**batch())
    before = torch._C._len_torch_function_stack()
    layer, head = model.model.layers[0], model.lm_head
    for module in (layer, head):
        module.register_forward_hook(lambda *_: seen.append(torch._C._len_torch_function_stack()))
    model(**batch())
    assert seen == [before] * 2


def test_models_of_other_threads_are_not_touched():
    model, other = patch_model(llama()), llama()
    found = []

    def run(*_):
        thread = threading.Thread(target=lambda: found.append(type(other(**batch()).logits)))
        thread.start()
        thread.join()

    model.lm_head.register_forward_hook(run)
    model(**batch())
    assert found == [torch.Tensor]


def test_unpatch_restores_the_model_bit_for_bit():
    model, plain = llama(), llama()
    before, cls, forward = dict(model.__dict__), type(model), type(model).forward
    assert unpatch_model(model) is model  # which was not patched
    patch_model(model, ignore_index=7, z_loss=0.5)
    patched = type(model)
    assert issubclass(patched, cls)
    assert patched.__name__ == cls.__name__
    assert patch_model(model) is model  # replaces the options
    assert type(model) is patched
    torch.testing.assert_close(model(**batch()).loss, plain(**batch()).loss)
    for _ in range(2):
        assert unpatch_model(model) is model
        assert type(model) is cls
        assert model.__dict__ == before
        assert cls.forward is forward
    outputs = model(**batch())
    assert type(outputs.logits) is torch.Tensor
    assert torch.equal(outputs.loss, plain(**batch()).loss)


def test_a_forward_set_on_the_instance_is_patched_too_and_restored(took):
    """accelerate and TRL set one."""
    model = llama()
    plain = step(model, **batch())
    original = model.forward

    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    model.forward = forward
    patch_model(model)
    assert_same_step(step(model, **batch()), plain)
    assert took == ["linear"]
    assert unpatch_model(model).__dict__["forward"] is forward
    del model.forward
    patch_model(model, label_smoothing=0.1)
    model.forward = lambda input_ids, labels: copy.copy(plain[0])
    with pytest.raises(RuntimeError, match="label_smoothing"):  # what takes no cross entropy cannot use the option
        model(**batch())
