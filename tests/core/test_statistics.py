"""`return_stats`: detached statistics, statistics with gradients, and the likeliest class."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    FusedCrossEntropyLoss,
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
)
from fused_ignore_ce.backends import reference

N, V, D = 5, 70, 4
OPTIONS = {"softcap": 5.0, "logit_scale": 0.7, "z_loss": 0.02}


def problem(device):
    h = torch.randn(N, D, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(V, D, dtype=torch.float64, device=device, requires_grad=True)
    return h, w, torch.tensor([3, -100, 69, 0, 12], device=device)


def objective(loss, lse, entropy):
    """Uses every result, with an upstream gradient of its own for each row."""
    rows = torch.arange(1.0, N + 1, dtype=torch.float64, device=lse.device)
    return 1.5 * loss + 0.3 * (rows * lse.square()).sum() - (entropy / rows).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_differentiable_statistics_of_logits(reduction, backend, device):
    h, w, y = problem(device)
    x = F.linear(h, w).detach().requires_grad_()
    loss, stats = fused_cross_entropy(
        x, y, reduction=reduction, return_stats="differentiable", backend=backend, **OPTIONS
    )
    expected = reference.rows(x, y, softcap=5.0, logit_scale=0.7)
    wanted = reference.cross_entropy(x, y, reduction=reduction, **OPTIONS)
    (ours,) = torch.autograd.grad(objective(loss, stats.lse, stats.entropy), x)
    (true,) = torch.autograd.grad(objective(wanted, expected.lse, expected.entropy), x, retain_graph=True)
    torch.testing.assert_close(ours, true)
    assert (ours[1] == 0).all()
    for name in ("lse", "entropy"):  # one of them alone, without the loss
        _, stats = fused_cross_entropy(x, y, return_stats="differentiable", backend=backend, **OPTIONS)
        (ours,) = torch.autograd.grad(getattr(stats, name).sum(), x)
        (true,) = torch.autograd.grad(getattr(expected, name).sum(), x, retain_graph=True)
        torch.testing.assert_close(ours, true)


def test_differentiable_statistics_of_hidden_states(backend, plan, device):
    h, w, y = problem(device)
    loss, stats = fused_linear_cross_entropy(h, w, y, return_stats="differentiable", backend=backend, **OPTIONS)
    x = F.linear(h, w)
    expected = reference.rows(x, y, softcap=5.0, logit_scale=0.7)
    wanted = reference.cross_entropy(x, y, **OPTIONS)
    for ours, true in zip(
        torch.autograd.grad(objective(loss, stats.lse, stats.entropy), (h, w)),
        torch.autograd.grad(objective(wanted, expected.lse, expected.entropy), (h, w)),
        strict=True,
    ):
        torch.testing.assert_close(ours, true)


def test_a_z_loss_of_ones_own_is_the_z_loss(backend, device):
    h, w, y = problem(device)
    loss, stats = fused_linear_cross_entropy(h, w, y, return_stats="differentiable", backend=backend)
    own = loss + 0.1 * stats.lse.square().sum() / stats.num_tokens
    ours = fused_linear_cross_entropy(h, w, y, z_loss=0.1, backend=backend)
    torch.testing.assert_close(own, ours)
    for one, other in zip(torch.autograd.grad(own, (h, w)), torch.autograd.grad(ours, (h, w)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_statistics_are_detached_unless_asked_for(linear, backend, device):
    h, w, y = problem(device)
    x = F.linear(h, w)
    losses = {
        how: fused_linear_cross_entropy(h, w, y, return_stats=how, backend=backend)
        if linear
        else fused_cross_entropy(x, y, return_stats=how, backend=backend)
        for how in (True, "differentiable")
    }
    assert not any(t.requires_grad for t in losses[True][1])
    requires = [name for name, t in losses["differentiable"][1]._asdict().items() if t.requires_grad]
    assert requires == ["lse", "entropy"]
    for one, other in zip(*(stats for _, stats in losses.values()), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="does not require grad"):
        losses[True][1].entropy.mean().backward()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_predicted_is_the_first_of_the_largest_logits(linear, backend, device):
    h, w, y = problem(device)
    with torch.no_grad():
        w *= 0.1
        w[11] = w[40] = 3.0  # a tie of the largest
        h[4] = 1.0
    if linear:
        _, stats = fused_linear_cross_entropy(h, w, y, return_stats=True, backend=backend)
    else:
        _, stats = fused_cross_entropy(F.linear(h, w), y, return_stats=True, backend=backend)
    likeliest = F.linear(h, w).argmax(1)
    assert stats.predicted.dtype == torch.int64
    assert torch.equal(stats.predicted[y != -100], likeliest[y != -100])
    assert stats.predicted[4] == 11
    assert stats.predicted[1] == 0  # ignored
    assert torch.equal(stats.correct, (likeliest == y) & (y != -100))


def test_faces_hand_it_on(backend, device):
    h, w, y = problem(device)
    x = F.linear(h, w)
    for _, stats in (
        FusedCrossEntropyLoss(return_stats="differentiable", backend=backend)(x, y),
        fused_causal_lm_loss(x[None], y[None], return_stats="differentiable", backend=backend),
        fused_linear_causal_lm_loss(h[None], w, y[None], return_stats="differentiable", backend=backend),
    ):
        assert stats.entropy.requires_grad
    with pytest.raises(ValueError, match="return_stats: expected False, True or \"differentiable\", got 'yes'"):
        fused_cross_entropy(x, y, return_stats="yes")


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("V", [10, 1100])  # one block of strided classes, and several blocks that splits share
def test_stats(V, probs, backend, device):
    x = torch.randn(2, V, 3, device=device)
    target = torch.rand(2, V, 3, device=device) if probs else torch.randint(0, V, (2, 3), device=device)
    index = target.argmax(1) if probs else target
    x.scatter_(1, index[:, None], 99.0)  # the model is right everywhere ...
    x[0, :, 1] = torch.randn(V)  # ... but here
    x[0, V // 2, 1] = 99.0
    index[0, 1] = 0
    if probs:
        target[0, :, 1] = torch.eye(V)[0]
    token_weight = torch.ones(2, 3, device=device)
    token_weight[1, 2] = 0
    loss, stats = fused_cross_entropy(x, target, token_weight=token_weight, return_stats=True, backend=backend)
    log_p = torch.log_softmax(x, 1)
    kept = token_weight != 0
    assert stats.num_tokens.shape == ()
    assert stats.num_tokens.dtype == torch.int64
    assert stats.num_tokens.item() == 5
    torch.testing.assert_close(stats.lse, x.logsumexp(1) * kept)
    torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(1) * kept, atol=1e-5, rtol=1e-4)
    assert torch.equal(stats.correct, (x.argmax(1) == index) & kept)
    assert stats.correct.sum() == 4
    assert not any(t.requires_grad for t in stats)
    torch.testing.assert_close(
        loss, fused_cross_entropy(x, target, token_weight=token_weight, backend=backend), rtol=1e-6, atol=0
    )


def test_correct_on_ties_is_the_first_class(backend, device):
    x = torch.zeros(2, 6000, device=device)
    target = torch.tensor([0, 5999], device=device)
    _, stats = fused_cross_entropy(x, target, return_stats=True, backend=backend)
    assert stats.correct.tolist() == [True, False]


def test_stats_of_masked_vocabulary(backend, device):
    x = torch.randn(2, 5000, device=device)
    x[:, :4500] = -torch.inf
    _, stats = fused_cross_entropy(x, torch.tensor([4600, 4700], device=device), return_stats=True, backend=backend)
    finite = torch.log_softmax(x[:, 4500:], 1)
    torch.testing.assert_close(stats.entropy, -(finite.exp() * finite).sum(1))
