"""`LossStats.token_loss`: the loss of every token, from the same pass, whatever is reduced and how."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_distillation_loss,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_log_probs,
)
from fused_ignore_ce.backends import reference

from ..helpers.device import DEVICE

BACKENDS = ["torch", "triton"]
N, V, D = 6, 37, 8
IGNORED = torch.tensor([False, True, False, False, True, False])


def given():
    torch.manual_seed(0)
    h, w = torch.randn(N, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    target = torch.randint(V, (N,)).masked_fill(IGNORED, -100).to(DEVICE)
    weight = torch.linspace(0.5, 1.5, N, device=DEVICE)
    return h.requires_grad_(), w.requires_grad_(), target, weight


def check(found, expected):
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach().to(found.dtype), rtol=1e-5, atol=1e-6)
    assert not found[IGNORED].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"z_loss": 0.1},
        {"grad_in_forward": True},
        {"grad_in_forward": True, "z_loss": 0.1},
    ],
    ids=str,
)
def test_of_logits(options, reduction, backend):
    h, w, target, weight = given()
    smoothing = options.get("label_smoothing", 0.0)
    expected = F.cross_entropy(h @ w.T, target, reduction="none", label_smoothing=smoothing)
    _, stats = fused_cross_entropy(
        h @ w.T, target, token_weight=weight, reduction=reduction, return_stats=True, backend=backend, **options
    )
    check(stats.token_loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"memory_budget": "40MB"}], ids=str)
def test_of_hidden_states(options, reduction, backend):
    h, w, target, weight = given()
    smoothing = options.get("label_smoothing", 0.0)
    expected = F.cross_entropy(h @ w.T, target, reduction="none", label_smoothing=smoothing)
    _, stats = fused_linear_cross_entropy(
        h, w, target, token_weight=weight, reduction=reduction, return_stats=True, backend=backend, **options
    )
    check(stats.token_loss, expected)


def test_of_the_others():
    h, w, target, _ = given()
    expected = F.cross_entropy(h @ w.T, target, reduction="none")
    *_, stats = fused_linear_log_probs(h, w, target, return_stats=True)
    check(stats.token_loss, expected)
    _, stats = fused_causal_lm_loss(h @ w.T, None, shift_labels=target, return_stats=True)
    check(stats.token_loss, expected)
    _, stats = fused_linear_causal_lm_loss(h, w, None, shift_labels=target, return_stats=True)
    check(stats.token_loss, expected)
    teacher = torch.randn(N, V, device=DEVICE)
    rows = reference.distillation_rows(h @ w.T, teacher, target)
    for reduction in ("mean", "none"):
        _, stats = fused_distillation_loss(h @ w.T, teacher, target, return_stats=True, reduction=reduction)
        check(stats.token_loss, rows)
        eye = torch.eye(V, device=DEVICE)
        _, stats = fused_linear_distillation_loss(h, w, teacher, eye, target, return_stats=True, reduction=reduction)
        check(stats.token_loss, rows)


def test_losses_of_domains():
    """A recipe of the docs: one mean for each domain, from the statistics of one loss."""
    h, w, target, _ = given()
    domain = torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    _, stats = fused_linear_cross_entropy(h, w, target, return_stats=True)
    kept = (target != -100).to(stats.token_loss.dtype)
    sums = torch.zeros(3, device=DEVICE).index_add_(0, domain, stats.token_loss)
    means = sums / torch.zeros(3, device=DEVICE).index_add_(0, domain, kept)
    for i in range(3):
        plain = F.cross_entropy((h @ w.T)[domain == i], target[domain == i])
        torch.testing.assert_close(means[i], plain.detach())
