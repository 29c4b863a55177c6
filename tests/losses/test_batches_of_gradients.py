"""Batches of upstream gradients give what they give one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

from fused_ignore_ce import (
    fused_cross_entropy,
    fused_distillation_loss,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_log_probs,
)
from fused_ignore_ce.deferred import defer

X, W = torch.randn(3, 4), torch.randn(5, 4)
Y = torch.tensor([1, 2, -100])

LOSSES = {
    "mean": lambda x, **k: fused_cross_entropy(x, Y, **k),
    "none": lambda x, **k: fused_cross_entropy(x, Y, reduction="none", **k),
    "gradient in forward": lambda x, **k: fused_cross_entropy(x, Y, grad_in_forward=True, **k),
    "with z-loss": lambda x, **k: fused_cross_entropy(x, Y, z_loss=0.1, grad_in_forward=True, **k),
    "in place": lambda x, **k: fused_cross_entropy(x * 1, Y, inplace_backward=True, **k),
    "rows in place": lambda x, **k: fused_cross_entropy(x * 1, Y, inplace_backward=True, reduction="none", **k),
    "probabilities": lambda x, **k: fused_cross_entropy(X, x.softmax(1), **k),
    "entropy": lambda x, **k: fused_cross_entropy(x, Y, return_stats="differentiable", **k)[1].entropy,
    "linear": lambda x, **k: fused_linear_cross_entropy(x, W, Y, **k),
    "linear rows": lambda x, **k: fused_linear_cross_entropy(x, W, Y, reduction="none", **k),
    "log-probabilities": lambda x, **k: fused_linear_log_probs(x, W, Y, **k),
}
DISTILLATIONS = {
    "distillation": lambda x, **k: fused_distillation_loss(x, X + 1, Y, **k),
    "rows of distillation": lambda x, **k: fused_distillation_loss(x, X + 1, Y, reduction="none", **k),
    "linear distillation": lambda x, **k: fused_linear_distillation_loss(x, W, X, W + 1, Y, **k),
    "rows of linear distillation": lambda x, **k: fused_linear_distillation_loss(
        x, W, X, W + 1, Y, reduction="none", **k
    ),
}


@pytest.mark.parametrize("loss", DISTILLATIONS.values(), ids=DISTILLATIONS)
def test_distillation(loss):
    test_batches(loss, "auto")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_batches(loss, backend):
    def gradient(upstream, **how):
        x = X.clone().requires_grad_()
        return torch.autograd.grad(loss(x, backend=backend), x, upstream, **how)[0]

    upstreams = torch.randn(6, *loss(X, backend=backend).shape)
    expected = torch.stack([gradient(each) for each in upstreams])
    torch.testing.assert_close(gradient(upstreams, is_grads_batched=True), expected)
    x = X.clone().requires_grad_()
    value = loss(x, backend=backend)
    vectorized = torch.vmap(lambda each: torch.autograd.grad(value, x, each)[0])(upstreams)
    torch.testing.assert_close(vectorized, expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if "in place" not in name])  # of which there is one backward
def test_jacobian(name, backend):
    loss = LOSSES[name]
    found = [jacobian(lambda x: loss(x, backend=backend), X, vectorize=vectorize) for vectorize in (True, False)]
    torch.testing.assert_close(*found)


def test_checkpoints(backend):
    """Saved tensors are read once for all gradients of a batch, as checkpoints want it."""
    x = X.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(lambda x: LOSSES["none"](x * 2, backend=backend), x, use_reentrant=False)
    (batched,) = torch.autograd.grad(loss, x, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(batched, jacobian(lambda x: LOSSES["none"](x * 2, backend=backend), X))


#: Of the logits of hidden states x.
DEFERRED = {
    "mean": lambda x: F.cross_entropy(x, Y),
    "none": lambda x: F.cross_entropy(x, Y, reduction="none"),
    "probabilities that need a gradient": lambda x: F.cross_entropy(x, (x / 2).softmax(-1), reduction="none"),
    "a reduction": lambda x: (x / 2).logsumexp(-1),
    "rows of a divergence": lambda x: F.kl_div(x.log_softmax(-1), (x / 2).detach().softmax(-1), reduction="none").sum(
        -1
    ),
    "a divergence": lambda x: F.kl_div(x.log_softmax(-1), (x / 2).detach().softmax(-1), reduction="batchmean"),
    "read": lambda x: x.square().mean() + (x * 2).sum(-1),
}


@pytest.mark.parametrize("loss", DEFERRED.values(), ids=DEFERRED)
def test_deferred_logits(loss):
    found = []
    for linear in (defer, F.linear):
        x, w = (t.clone().requires_grad_() for t in (X, W))
        value = loss(linear(x, w))
        upstreams = torch.linspace(-1, 2, 3 * value.numel()).view(3, *value.shape)
        gradients = torch.autograd.grad(value, [x, w], upstreams, retain_graph=True, is_grads_batched=True)

        def gradient(each, value=value, w=w):
            return torch.autograd.grad(value, w, each, retain_graph=True)[0]

        vectorized = jacobian(lambda x, linear=linear: loss(linear(x, W)), X, vectorize=True)
        found.append([*gradients, torch.vmap(gradient)(upstreams), vectorized])
    torch.testing.assert_close(*found)
