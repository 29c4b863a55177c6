"""Faults that are known from other libraries' losses, and that no other file tests.

Other files test the rest: transposed logits and 2^31 elements in test_layouts, a second backward and float16 underflow
in test_gradients, masked vocabularies, all rows ignored and probability targets with empty batches in test_ignore and
losses/test_cross_entropy, softcap and the vocabulary mask in core/test_options.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_writes_nothing_of_the_callers(grad, backend, device):
    """With a graph or without one, neither the gradient nor zeros for ignored rows are written over the logits."""
    x = torch.randn(4, 300, device=device, requires_grad=True)
    y = torch.tensor([1, -100, 299, -100], device=device)
    q, token_weight = torch.rand(4, 300, device=device), torch.tensor([1.0, 1.0, 0.0, 2.0], device=device)
    weight = torch.rand(300, device=device)
    tensors = (x, y, q, token_weight, weight)
    before = [t.detach().clone() for t in tensors]
    with torch.set_grad_enabled(grad):
        losses = [
            fused_cross_entropy(x, target, weight, token_weight=token_weight, inplace_backward=True, backend=backend)
            for target in (y, q)
        ]
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(t._version == 0 for t in tensors)
    assert all(loss.requires_grad == grad for loss in losses)


def test_mean_counts_kept_tokens_only(backend, device):
    """The mean equals its definition, the sum of the kept rows' losses divided by their number."""
    x, y = torch.randn(5, 30, device=device), torch.tensor([1, -100, 3, -100, -100], device=device)
    kept = [-F.log_softmax(x[i], 0)[y[i]] for i in (0, 2)]
    torch.testing.assert_close(fused_cross_entropy(x, y, backend=backend), (kept[0] + kept[1]) / 2)


def test_the_result_does_not_depend_on_a_threshold_of_the_data(backend, device, no_worse):
    """Nothing is filtered: gradients far below every 16-bit resolution are still there in float32."""
    x = torch.zeros(1, 1000, device=device)
    x[0, 0] = 60.0
    results = []
    for function, dtype in (
        (fused_cross_entropy, x.dtype),
        (F.cross_entropy, x.dtype),
        (F.cross_entropy, torch.double),
    ):
        leaf = x.to(dtype).requires_grad_()
        extra = {"backend": backend} if function is fused_cross_entropy else {}
        loss = function(leaf, torch.tensor([0], device=device), **extra)
        results.append(torch.autograd.grad(loss, leaf)[0][:, 1:])
    no_worse("dx", *results, terms=x.shape[1])
    assert (results[0] > 0).all()


def test_weight_with_ignored_targets_and_smoothing(backend, device):
    """The sharded losses of other packages refuse this combination."""
    x, y, weight = torch.randn(4, 9, device=device), torch.tensor([1, -100, 3, 8], device=device), torch.rand(9)
    options = {"weight": weight.to(device), "label_smoothing": 0.1}
    torch.testing.assert_close(fused_cross_entropy(x, y, backend=backend, **options), F.cross_entropy(x, y, **options))
