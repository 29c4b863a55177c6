"""Multi-token prediction: one head several times in a forward (DeepSeek-V3), or several heads (Medusa)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ignore_ce import defer_logits
from fused_ignore_ce.hf import fusion_report

from ..helpers.live_memory import LiveMemory

B, T, D, V, DEPTH = 2, 64, 16, 4096, 3


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)

    def forward(self, ids):
        return torch.tanh(self.mix(self.embed(ids)))


class OneHead(Backbone):
    """Each depth has a layer of its own, sees the next token's embedding, and shares the head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(DEPTH - 1))
        self.head = nn.Linear(D, V, bias=False)
        self.heads = [self.head]

    def forward(self, ids):
        hidden = super().forward(ids)
        logits = [self.head(hidden)]
        for depth, layer in enumerate(self.layers, 1):
            hidden = torch.tanh(layer(torch.cat([hidden, self.embed(ids.roll(-depth, 1))], -1)))
            logits.append(self.head(hidden))
        return logits


class SeveralHeads(Backbone):
    """Each depth has a block and a head of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(DEPTH))
        self.heads = nn.ModuleList(nn.Linear(D, V) for _ in range(DEPTH))

    def forward(self, ids):
        hidden = super().forward(ids)
        return [head(hidden + F.silu(block(hidden))) for block, head in zip(self.blocks, self.heads, strict=True)]


def losses(model, ids, count=DEPTH):
    """Depth k predicts the token k + 1 positions on."""
    found = []
    for depth, logits in enumerate(model(ids)[:count]):
        target = F.pad(ids, (0, depth + 1), value=-100)[:, depth + 1 :]
        found.append(F.cross_entropy(logits.view(-1, V), target.reshape(-1)))
    return found


@pytest.mark.parametrize("cls", [OneHead, SeveralHeads])
def test_every_loss_is_fused(cls):
    torch.manual_seed(0)
    plain = cls()
    ours = copy.deepcopy(plain)
    ours.heads = [*map(defer_logits, ours.heads)] if cls is OneHead else nn.ModuleList(map(defer_logits, ours.heads))
    ids = torch.randint(0, V, (B, T))
    expected, found = losses(plain, ids), losses(ours, ids)
    torch.testing.assert_close(found, expected)
    sum(expected).backward()
    sum(found).backward()
    for mine, true in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad)
    reports = [fusion_report(head) for head in ours.heads]
    assert sum(report.fused["cross_entropy"].calls for report in reports) == DEPTH
    assert not any(report.reads for report in reports)


@pytest.mark.parametrize("cls", [OneHead, SeveralHeads])
def test_scratch_memory_is_that_of_one_loss(cls):
    """With more losses, there are more gradients of hidden states and heads, but not one more tile of logits."""
    model = cls()
    for head in model.heads:
        defer_logits(head)

    def peak(count):
        model.zero_grad()
        with LiveMemory() as memory:
            memory.peak = 0
            sum(losses(model, torch.randint(0, V, (B, T)), count)).backward()
        return memory.peak

    tile, gradients = 4 * B * T * V, 4 * (V + B * T) * D
    assert peak(DEPTH) - peak(1) < (DEPTH - 1) * 2 * gradients + tile / 8
    assert (DEPTH - 1) * 2 * gradients + tile / 8 < (DEPTH - 1) * tile


def test_a_backward_holds_one_gradient_of_the_head():
    """Forward has computed it, and backward scales it where it is, as long as no other backward needs it."""
    features = 1024
    head = defer_logits(nn.Linear(features, V, bias=False))
    hidden = torch.randn(8, features, requires_grad=True)
    with LiveMemory() as memory:
        loss = F.cross_entropy(head(hidden), torch.arange(8))
        memory.peak = 0
        (2 * loss).backward()
    of_head = 4 * V * features
    assert memory.peak < 2.5 * of_head  # the head itself, its gradient, and what is no more than a tile


@pytest.mark.parametrize("freed", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
@pytest.mark.parametrize("order", [1, -1], ids=["forward", "reverse"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_loss_of_two_heads_whose_weights_are_there_in_calls_only(freed, order, reduction):
    """As sharding wrappers do: a hook before the call brings the weights, and one after it takes them away."""
    classes = 11
    heads = nn.Linear(D, classes), nn.Linear(2 * D, classes).requires_grad_(False)
    hidden, teachers = torch.randn(3, D, requires_grad=True), torch.randn(3, 2 * D)

    def divergence():
        log_q, log_p = [x.log_softmax(-1) for x in (heads[0](hidden), heads[1](teachers))][::order]
        return F.kl_div(log_q, log_p, reduction=reduction, log_target=True).sum(-1).sum()

    inputs = hidden, *heads[0].parameters()
    plain = divergence()
    expected = torch.autograd.grad(plain, inputs)
    wholes = {p: p.data for i in freed for p in heads[i].parameters()}

    def gather(head, *_):
        for p in head.parameters():
            p.data = wholes[p]

    def free(head, *_):
        for p in head.parameters():
            p.data = torch.empty(0)

    for i in freed:
        heads[i].register_forward_pre_hook(gather)
        heads[i].register_forward_hook(free)
        free(heads[i])
    for head in heads:
        defer_logits(head)
    ours = divergence()
    torch.testing.assert_close(ours, plain)
    for i in freed:
        gather(heads[i])
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), expected)
