"""`zero_if_all_ignored`: the mean of no tokens is NaN, as PyTorch's, or 0 if that was asked for."""

import pytest
import torch

from fused_ignore_ce import (
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
)
from fused_ignore_ce.hf import patch_model

from ..helpers.hf_worker import batches, llama

B, T, V, D = 2, 3, 20, 4

LOSSES = {
    "logits": lambda h, w, y, **o: fused_cross_entropy((h @ w.T).flatten(0, 1), y.flatten(), **o),
    "in forward": lambda h, w, y, **o: fused_cross_entropy(
        (h @ w.T).flatten(0, 1), y.flatten(), grad_in_forward=True, **o
    ),
    "linear": fused_linear_cross_entropy,
    "causal": lambda h, w, y, **o: fused_causal_lm_loss(h @ w.T, y, **o),
    "linear causal": fused_linear_causal_lm_loss,
    "module": lambda h, w, y, **o: FusedCrossEntropyLoss(**o)((h @ w.T).flatten(0, 1), y.flatten()),
}
OPTIONS = {"plain": {}, "z-loss": {"z_loss": 0.1}, "sixteen bits": {"loss_dtype": torch.bfloat16}}


def problem(device, kept):
    h, w = torch.randn(B, T, D, device=device).requires_grad_(), torch.randn(V, D, device=device).requires_grad_()
    y = torch.full((B, T), -100, device=device)
    if kept:
        y[1, 1] = 7
    return h, w, y


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_mean_of_nothing(loss, options, backend, device):
    options = {**options, "backend": backend}
    h, w, y = problem(device, kept=False)
    assert loss(h, w, y, **options).isnan()
    zero = loss(h, w, y, zero_if_all_ignored=True, **options)
    assert zero == 0
    assert zero.dtype == loss(h, w, y, **options).dtype
    for gradient in torch.autograd.grad(zero, (h, w)):
        assert (gradient == 0).all()
    h, w, y = problem(device, kept=True)
    ours, plain = (loss(h, w, y, zero_if_all_ignored=zero, **options) for zero in (True, False))
    assert torch.equal(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(plain, (h, w)), strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0


def test_a_nan_that_is_a_loss_remains_one(backend, device):
    """Only the mean of no tokens becomes 0. A NaN that comes from the inputs stays NaN."""
    h, w, y = problem(device, kept=True)
    h = h.detach() * float("nan")
    for loss in LOSSES.values():
        assert loss(h, w, y, zero_if_all_ignored=True, backend=backend).isnan()


def test_the_linear_module_and_a_count_of_0(device):
    h, _, y = problem(device, kept=False)
    assert FusedLinearCrossEntropyLoss(D, V, zero_if_all_ignored=True, device=device)(h, y) == 0
    x = torch.randn(B, T, V, device=device)
    for count in (0, torch.tensor(0, device=device)):
        assert fused_causal_lm_loss(x, y, num_items_in_batch=count, zero_if_all_ignored=True) == 0
    with pytest.raises(TypeError, match="zero_if_all_ignored: expected True or False, got 'yes'"):
        FusedCrossEntropyLoss(zero_if_all_ignored="yes")


@pytest.mark.parametrize("outside", [False, True], ids=["in the forward", "after it"])
def test_patched_models(outside):
    batch = batches(1)[0]
    labels = torch.full_like(batch["labels"], -100)
    losses = []
    for options in ({}, {"zero_if_all_ignored": True}):
        model = patch_model(llama(num_hidden_layers=1), without_labels=outside, **options).train()
        if outside:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].flatten())
            )
        else:
            losses.append(model(input_ids=batch["input_ids"], labels=labels).loss)
    assert losses[0].isnan()
    assert losses[1] == 0
    losses[1].backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_it_leaves_other_losses_of_a_patched_model_alone():
    """The option changes only the mean of no tokens, so it is no error where other losses are taken."""
    model = patch_model(llama(num_hidden_layers=1), without_labels=True, zero_if_all_ignored=True).train()
    ids = batches(1)[0]["input_ids"]
    log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    (-log_probs.mean()).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
