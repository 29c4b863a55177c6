"""A patched model is still that model: copied, saved, loaded, generating, evaluated, subclassed."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import patch_model, unpatch_model

from ..helpers.hf_worker import PAD, MyLlama, assert_deferred, assert_same, batches, llama, spied, trajectory

STEPS = 4


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def torch_saved(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


#: How a model is copied, and whether the copy is patched.
COPIES = {
    "copy": (lambda model, folder: copy.copy(model), True),
    "deepcopy": (lambda model, folder: copy.deepcopy(model), True),
    "pickle": (lambda model, folder: pickle.loads(pickle.dumps(model)), True),
    "torch.save": (torch_saved, True),
    "save_pretrained": (saved_and_loaded, False),
    "state_dict": (lambda model, folder: (m := llama(seed=9)).load_state_dict(model.state_dict()) and m, False),
}


@pytest.mark.parametrize(("copied", "patched"), COPIES.values(), ids=COPIES)
def test_copies(copied, patched, tmp_path, monkeypatch):
    """The copy trains on, from where the model was, with the model's options."""
    options = {"ignore_index": PAD, "z_loss": 0.01}
    original = patch_model(llama(), **options)
    trajectory(original, batches(STEPS))
    reference = patch_model(llama(), **options)
    trajectory(reference, batches(STEPS))
    other = copied(original, tmp_path)
    assert isinstance(other, LlamaForCausalLM)
    if not patched:
        assert type(other) is LlamaForCausalLM
        patch_model(other, **options)
    for (name, ours), (_, theirs) in zip(other.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    expected, _ = trajectory(reference, batches(STEPS, seed=5))
    spy = spied(monkeypatch)
    losses, outputs = trajectory(other, batches(STEPS, seed=5))
    assert_same(losses, expected, rel=0)
    assert_deferred(outputs)
    assert spy.calls == STEPS
    unpatch_model(other)
    assert type(other) is LlamaForCausalLM


def test_the_configuration_names_the_class(tmp_path):
    patch_model(llama(), ignore_index=PAD).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_generate(options, took):
    plain, model = llama(), llama()
    trajectory(plain, batches(STEPS))
    model.load_state_dict(plain.state_dict())
    patch_model(model, ignore_index=PAD)
    batch = batches(1)[0]
    model(**batch).loss.backward()
    ids = []
    for m in (plain, model):
        torch.manual_seed(0)
        ids.append(m.eval().generate(batch["input_ids"][:, :4], max_new_tokens=8, **options))
    assert torch.equal(*ids)
    assert ids[0].shape[1] > 4
    assert took == ["linear"]  # the loss before


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_labels(mode, took):
    """Without labels and gradients the model runs its own code. Logits are plain tensors with the same bits."""
    batch = batches(1)[0]
    del batch["labels"]
    plain, model = getattr(llama(), mode)(), getattr(patch_model(llama()), mode)()
    expected, ours = plain(**batch), model(**batch)
    assert type(ours.logits) is DeferredLogits
    assert torch.equal(ours.logits, expected.logits)
    with torch.no_grad():
        expected, ours = plain(**batch), model(**batch)
    assert type(ours.logits) is torch.Tensor
    assert torch.equal(ours.logits, expected.logits)
    assert ours.keys() == expected.keys()
    assert took == []


def test_evaluated_with_labels():
    batch = batches(1)[0]
    with torch.no_grad():
        expected, ours = llama().eval()(**batch), patch_model(llama()).eval()(**batch)
    torch.testing.assert_close(ours.loss, expected.loss)
    assert not ours.logits.is_materialized
    assert not ours.logits.requires_grad
    assert torch.equal(ours.logits.argmax(-1), expected.logits.argmax(-1))
    assert (ours.logits.cpu().numpy() == expected.logits.numpy()).all()


def test_a_forward_of_ones_own(monkeypatch):
    expected, _ = trajectory(llama(cls=MyLlama), batches(STEPS))
    spy = spied(monkeypatch)
    losses, outputs = trajectory(patch_model(llama(cls=MyLlama)), batches(STEPS))
    assert_same(losses, expected)
    assert_deferred(outputs)
    assert spy.calls == STEPS


@pytest.mark.parametrize("cls", [LlamaForCausalLM, MyLlama])
@pytest.mark.parametrize("ids", [PAD, [PAD], {PAD, 5}], ids=str)
def test_ignored_ids(cls, ids, monkeypatch):
    """Labels that contain the ids give the same losses as labels in which the ids are -100."""
    given = [ids] if isinstance(ids, int) else list(ids)

    def data(replaced):
        made = batches(STEPS, ignored=PAD)
        for batch in made:
            batch["labels"][0, -4:-2] = 5
            if replaced:
                for index in given:
                    batch["labels"].masked_fill_(batch["labels"] == index, -100)
        return made

    expected, _ = trajectory(llama(cls=cls), data(True))
    spy = spied(monkeypatch)
    losses, outputs = trajectory(patch_model(llama(cls=cls), ignore_index=ids), data(False))
    assert_same(losses, expected)
    assert_deferred(outputs)
    assert spy.calls == STEPS
