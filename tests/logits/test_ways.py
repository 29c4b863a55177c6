"""The table of ways says which way a loss of logits takes, and what is held for backward."""

import pytest
import torch

from fused_ignore_ce import fused_cross_entropy
from fused_ignore_ce.logits import ways
from fused_ignore_ce.logits.ways import WAYS

N, V = 6, 11


@pytest.fixture
def taken(monkeypatch):
    """The names of the ways that were taken."""
    names = []

    def recorded(name, way):
        return way._replace(loss=lambda problem: (names.append(name), way.loss(problem))[1])

    monkeypatch.setattr(ways, "WAYS", {name: recorded(name, way) for name, way in WAYS.items()})
    return names


def operands():
    torch.manual_seed(0)
    target = torch.randint(V, (N,))
    target[2] = -100
    return torch.randn(N, V, requires_grad=True), target


def weights(**kind):
    return torch.rand(N, **kind) + 0.5


CASES = {
    "plain": ({}, "torch", "reduced by PyTorch"),
    "gradient in forward": ({"grad_in_forward": True}, "torch", "gradient in forward"),
    "gradient in forward, z-loss": ({"grad_in_forward": True, "z_loss": 0.1}, "torch", "gradient in forward"),
    "gradient in forward of rows": ({"grad_in_forward": True, "reduction": "none"}, "torch", "reduced by PyTorch"),
    "kernel": ({}, "triton", "reduced by the kernel"),
    "kernel, statistics": ({"return_stats": True}, "triton", "reduced by the kernel"),
    "kernel, token weights": ({"token_weight": weights()}, "triton", "reduced by the kernel"),
    "kernel, gradient in forward": ({"grad_in_forward": True}, "triton", "gradient in forward, reduced by the kernel"),
    "kernel, gradient in forward, z-loss": ({"grad_in_forward": True, "z_loss": 0.1}, "triton", "gradient in forward"),
    "z-loss": ({"z_loss": 0.1}, "triton", "reduced by PyTorch"),
    "rows": ({"reduction": "none"}, "triton", "reduced by PyTorch"),
    "trained token weights": ({"token_weight": weights(requires_grad=True)}, "triton", "reduced by PyTorch"),
    "differentiable statistics": ({"return_stats": "differentiable"}, "triton", "reduced by PyTorch"),
}


@pytest.mark.parametrize(("options", "backend", "way"), CASES.values(), ids=CASES)
def test_the_way_that_is_taken(options, backend, way, taken):
    x, target = operands()
    fused_cross_entropy(x, target, backend=backend, **options)
    assert taken == [way]


def test_a_gradient_of_probabilities_is_computed_in_backward(taken):
    x, _ = operands()
    q = torch.rand(N, V).softmax(-1).requires_grad_()
    fused_cross_entropy(x, q, grad_in_forward=True)
    assert taken == ["reduced by PyTorch"]


def test_the_last_way_takes_every_loss():
    *_, last = WAYS.values()
    assert last.condition(None)


@pytest.mark.parametrize(("options", "backend", "way"), CASES.values(), ids=CASES)
def test_what_is_saved(options, backend, way):
    """Beside the logits or their gradient, only numbers per row are held."""
    x, target = operands()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_cross_entropy(x, target, backend=backend, **options)
    of_logits_size = [t for t in saved if t.numel() >= N * V]
    assert len(of_logits_size) == 1
    holds_logits = of_logits_size[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert holds_logits == ("the logits;" in WAYS[way].saved)
    assert holds_logits != (WAYS[way].saved == "the gradient of the logits")
