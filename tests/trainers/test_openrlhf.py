"""docs/guides/trainers/openrlhf.md, with OpenRLHF's own `Actor`: `make test-trainers` installs it."""

import importlib.machinery
import importlib.util
import sys
from unittest import mock

import pytest
import torch

from fused_ignore_ce.hf import fusion_report

from ..helpers.hf_worker import batches, llama
from ..helpers.snippets import names_of

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("make test-trainers installs OpenRLHF", allow_module_level=True)


@pytest.fixture(scope="module")
def module():
    """`openrlhf.models.actor`, which needs neither flash-attn nor DeepSpeed for what is tested here."""
    absent = ("deepspeed", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    for name in absent:
        sys.modules[name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    import openrlhf.models.actor

    for name in absent:
        del sys.modules[name]
    return openrlhf.models.actor


@pytest.fixture
def page(module, monkeypatch):
    for name in ("log_probs_from_logits", "compute_entropy"):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    return names_of("guides/trainers/openrlhf.md")


def step(cls, temperature, entropy):
    """The action's log-probabilities, the entropies and the gradients that a trainer takes of an actor."""
    actor = cls(llama(), temperature=temperature)
    actor.packing_samples = False
    (batch,) = batches(1)
    kept = (batch["labels"] != -100)[:, 1:].long()
    log_probs, output = actor(
        batch["input_ids"], kept, batch["attention_mask"], return_output=True, return_entropy=entropy
    )
    weights = torch.linspace(-1, 2, kept.numel()).view_as(kept)
    loss, found = (log_probs * weights).sum(), [log_probs.detach()]
    if entropy:
        loss = loss + 0.3 * (output.entropy * kept).sum()
        found.append(output.entropy.detach())
    loss.backward()
    with torch.no_grad():
        found.append(actor(batch["input_ids"], kept, batch["attention_mask"]))
    return found, [p.grad for p in actor.parameters()], actor


@pytest.mark.parametrize("entropy", [False, True], ids=["log-probabilities", "entropies"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_actor_of_the_page(module, monkeypatch, temperature, entropy):
    with monkeypatch.context() as patch:  # without the compiler, which is theirs to test
        patch.setattr(module, "compute_entropy", module.compute_entropy._torchdynamo_orig_callable)
        *expected, _ = step(module.Actor, temperature, entropy)
    with monkeypatch.context() as patch:
        for name in ("log_probs_from_logits", "compute_entropy"):
            patch.setattr(module, name, getattr(module, name))  # put back afterwards
        *found, actor = step(names_of("guides/trainers/openrlhf.md")["FusedActor"], temperature, entropy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    report = fusion_report(actor.model)
    assert len(report.fused) == 1 + entropy, report
    assert not report.reads, report


def test_log_probs_have_a_temperature(page):
    logits, labels = torch.randn(2, 3, 11), torch.arange(6).view(2, 3)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(page["log_probs_from_logits"](logits, labels, 0.7), expected)
