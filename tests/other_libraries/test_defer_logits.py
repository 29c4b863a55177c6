"""`defer_logits` on the models and the losses of LitGPT and torchtitan, as their packages have them.

They need versions of packages that the other tests do not have: `make test-other-libraries` runs these.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import defer_logits, undefer_logits
from fused_ignore_ce.hf import fusion_report

V, IDS = 211, torch.arange(48).mul(37).remainder(211).view(3, 16)
LABELS = IDS.roll(-1, 1).masked_fill(torch.arange(48).view(3, 16) % 5 == 0, -100)


def gradients(model, loss):
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def train(model, loss_of, steps=3):
    """Losses of some steps of SGD, and the gradients of the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, found = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        found = gradients(model, loss)
        losses.append(loss.detach())
        optimizer.step()
    return losses, found


def check_same_and_fused(model, loss_of):
    """One line on the head: the training is the same, and no logits are read."""
    plain = train(copy.deepcopy(model), loss_of)
    deferred = copy.deepcopy(model)
    defer_logits(deferred.lm_head)
    torch.testing.assert_close(train(deferred, loss_of), plain)
    report = fusion_report(deferred.lm_head)
    assert report.fused, report
    assert not report.reads, report
    undefer_logits(deferred.lm_head)
    assert type(deferred.lm_head) is type(model.lm_head)


@pytest.fixture
def litgpt_model():
    litgpt = pytest.importorskip("litgpt", reason="make test-other-libraries installs LitGPT")
    torch.manual_seed(0)
    return litgpt.GPT(litgpt.Config.from_name("pythia-14m", n_layer=2, n_embd=32, n_head=4, padded_vocab_size=V))


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_litgpt(litgpt_model, chunk_size):
    """LitGPT's loss over all rows, and the one that it takes of chunks of them."""
    from litgpt.utils import chunked_cross_entropy

    check_same_and_fused(litgpt_model, lambda m: chunked_cross_entropy(m(IDS), LABELS, chunk_size=chunk_size))


def test_litgpt_with_a_head_in_chunks(litgpt_model):
    """Its fine-tuning recipes call the head on parts of the sequence and get a list of logits."""
    from litgpt.utils import chunked_cross_entropy

    check_same_and_fused(litgpt_model, lambda m: chunked_cross_entropy(m(IDS, lm_head_chunk_size=5), LABELS))


@pytest.fixture
def torchtitan_model(monkeypatch):
    pytest.importorskip("torchtitan", reason="make test-other-libraries installs torchtitan")
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


def positions():
    return torch.arange(16).expand(3, 16)


def test_torchtitan(torchtitan_model):
    from torchtitan.components.loss import CrossEntropyLoss

    loss = CrossEntropyLoss.Config().build()
    tokens = (LABELS != -100).sum()
    check_same_and_fused(torchtitan_model, lambda m: loss(m(IDS, positions()), LABELS, tokens)[0])


def test_torchtitan_in_chunks(torchtitan_model):
    """Its trainer's loss calls the head on parts of the sequence, and backward in between."""
    from torchtitan.components.loss import ChunkedLossWrapper

    def loss_of(model):
        loss = ChunkedLossWrapper.Config(num_chunks=4).build()
        loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
        return loss(model(IDS, positions()), LABELS, (LABELS != -100).sum())[0]

    check_same_and_fused(torchtitan_model, loss_of)
