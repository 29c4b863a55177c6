"""Tensors whose memory does not hold their values, lazily negated and zero ones, give the results of their values."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy, fused_linear_log_probs

N, V, D = 6, 150, 8


def negated(values):
    """The values as a view of their negatives, as `torch.complex(...).conj().imag` gives."""
    if values.is_floating_point():
        lazy = torch.complex(torch.zeros_like(values), -values).conj().imag
    else:
        lazy = torch._neg_view(-values)
    assert lazy.is_neg()
    assert torch.equal(lazy, values)
    return lazy


def expanded(values):
    """The first element as a lazily negated view that has the memory of one element."""
    return negated(values.reshape(-1)[:1]).expand(values.numel()).view_as(values)


def zero(values):
    """A tensor of zeros without memory, as autograd's forward mode makes them."""
    return torch._efficientzerotensor(tuple(values.shape), dtype=values.dtype, device=values.device)


LAZY = [negated, expanded, zero]


def tensors(device, probs):
    target = torch.rand(N, V, device=device) if probs else torch.tensor([1, -100, 0, V - 1, 5, 7], device=device)
    return {
        "input": torch.randn(N, V, device=device),
        "target": target,
        "weight": torch.rand(V, device=device) + 0.1,
        "token_weight": torch.rand(N, device=device) + 0.1,
        "normalizer": torch.tensor(3.0, device=device),
    }


def equal_results(function, given, name, lazy, dloss):
    """The results of `function` with one lazy tensor are those with its values."""
    results = []
    for change in (lazy, lambda values: lazy(values).resolve_neg() + 0):
        changed = {key: (change(t) if key == name else t).detach() for key, t in given.items()}
        leaves = [t.requires_grad_() for t in changed.values() if t.is_floating_point()]
        found = function(changed)
        upstream = change(dloss(found)) if name == "dloss" else dloss(found)
        results.append((found, *torch.autograd.grad(found, leaves, upstream, allow_unused=True)))
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("name", ["input", "target", "weight", "token_weight", "normalizer", "dloss"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_logits(probs, reduction, name, lazy, backend, device):
    given = tensors(device, probs)
    if reduction == "none":
        del given["normalizer"]
    if name in given or name == "dloss":

        def loss(t):
            constants = {key: t[key].detach() for key in ("weight", "token_weight", "normalizer") if key in t}
            return fused_cross_entropy(t["input"], t["target"], **constants, reduction=reduction, backend=backend)

        equal_results(loss, given, name, lazy, lambda found: torch.linspace(1, 2, found.numel()).view_as(found))


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("name", ["h", "w", "b", "target", "dloss"])
@pytest.mark.parametrize("function", [fused_linear_cross_entropy, fused_linear_log_probs])
def test_hidden_states(function, name, lazy, backend, device):
    given = {
        "h": torch.randn(N, D, device=device),
        "w": torch.randn(V, D, device=device),
        "b": torch.randn(V, device=device),
        "target": torch.tensor([1, -100, 0, V - 1, 5, 7], device=device),
    }

    def loss(t):
        return function(t["h"], t["w"], t["target"], linear_bias=t["b"], backend=backend)

    equal_results(loss, given, name, lazy, lambda found: torch.linspace(1, 2, found.numel()).view_as(found))


def test_gradients_of_statistics(backend, device):
    x, y = torch.randn(N, V, device=device), torch.arange(N, device=device)

    def gradient(change):
        leaf = x.detach().requires_grad_()
        _, stats = fused_cross_entropy(leaf, y, return_stats="differentiable", backend=backend)
        upstream = change(torch.linspace(1, 2, N, device=device))
        return torch.autograd.grad((stats.lse, stats.entropy), leaf, (upstream, upstream))[0]

    assert torch.equal(gradient(negated), gradient(torch.clone))


@pytest.mark.parametrize("in_forward", [False, True])
def test_in_place(in_forward, backend, device):
    """A gradient that overwrites lazily negated logits is read there with the right sign."""
    x, y = torch.randn(N, V, device=device), torch.tensor([1, -100, 0, V - 1, 5, 7], device=device)
    logits = negated(x).requires_grad_()
    loss = fused_cross_entropy(
        logits, y, inplace_backward=True, grad_in_forward=in_forward,
        backend=backend,
    )  # fmt: skip
    (loss * 2).backward()
    wanted = x.clone().requires_grad_()
    (F.cross_entropy(wanted, y) * 2).backward()
    torch.testing.assert_close(logits.grad, wanted.grad)
    torch.testing.assert_close(logits.detach().resolve_neg(), wanted.grad)


def test_the_example_of_the_report(backend, device):
    x = torch.complex(torch.zeros(1, 2), torch.tensor([[0.0, -1.0]])).to(device).conj().imag
    loss = fused_cross_entropy(x, torch.tensor([0], device=device), backend=backend)
    torch.testing.assert_close(loss, torch.tensor(1.3132617, device=device))
