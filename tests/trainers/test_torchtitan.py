"""docs/guides/trainers/torchtitan.md, with torchtitan's own loss and model: `make test-trainers` installs it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.hf import fusion_report

from ..helpers.snippets import names_of
from .training import IDS, LABELS, gradients

loss = pytest.importorskip("torchtitan.components.loss", reason="make test-trainers installs torchtitan")


@pytest.fixture
def model(monkeypatch):
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.llama3 import model_registry

    def attention(self, q, k, v, **_):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(FlexAttention, "forward", attention)  # FlexAttention has no backward on a CPU
    torch.manual_seed(0)
    model = model_registry("debugmodel").model.build()
    model.init_states()
    return model


def step(model, loss_fn):
    """What the trainer does: it gives the head to the loss, then takes the loss of hidden states."""
    assert isinstance(loss_fn, loss.ChunkedLossWrapper)
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    hidden = model(IDS, torch.arange(16).expand(3, 16))
    return gradients(model, loss_fn(hidden, LABELS, (LABELS != -100).sum())[0])


@pytest.mark.parametrize("inner", ["CrossEntropyLoss", "FusedCrossEntropy"])
def test_the_loss_of_the_page(model, inner):
    page = names_of("guides/trainers/torchtitan.md")
    expected = step(copy.deepcopy(model), loss.ChunkedLossWrapper.Config(num_chunks=4).build())
    loss_fn = (page.get(inner) or getattr(loss, inner)).Config()
    fused = page["FusedLoss"].Config(loss_fn=loss_fn).build()
    assert fused.num_chunks == 1
    torch.testing.assert_close(step(model, fused), expected)
    report = fusion_report(model.lm_head)
    assert sum(kind.calls for kind in report.fused.values()) == 1, report
    assert not report.reads, report


def test_the_configuration_of_the_page_builds_its_loss():
    """The function of the page is what torchtitan calls for `--config`."""
    page = names_of("guides/trainers/torchtitan.md")
    config = page["llama3_8b"]()
    assert type(config.loss.build()) is page["FusedLoss"]
    assert config.loss.loss_fn.global_vocab_size == config.model_spec.model.vocab_size
