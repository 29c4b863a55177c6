"""`loss_dtype`: PyTorch's rule by default, float32 where a 16-bit loss would overflow or be too coarse."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
)

V, D = 50, 4


def test_a_float16_sum_over_many_tokens(backend, device):
    x, y = torch.zeros(40, V, device=device).half(), torch.zeros(40, dtype=torch.long, device=device)
    h, w = torch.zeros(40, D, device=device).half(), torch.zeros(V, D, device=device).half()
    weight = torch.full((V,), 1000.0, device=device)  # as if there were a thousand times the tokens
    expected = F.cross_entropy(x.double(), y, weight.double(), reduction="sum")
    for loss_dtype in (None, torch.float32):
        options = {"weight": weight, "reduction": "sum", "loss_dtype": loss_dtype, "backend": backend}
        of_logits = fused_cross_entropy(x.requires_grad_(), y, **options)
        of_hidden_states = fused_linear_cross_entropy(h, w.requires_grad_(), y, **options)
        for leaf, found in ((x, of_logits), (w, of_hidden_states)):
            assert torch.autograd.grad(found, leaf)[0].isfinite().all()
            assert found.isinf() if loss_dtype is None else (found / expected - 1).abs() < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("grad_in_forward", [False, True], ids=["", "grad_in_forward"])
def test_a_loss_is_rounded_once_to_the_dtype_that_is_asked_for(grad_in_forward, reduction, backend, device):
    x, y = torch.randn(6, V, device=device).bfloat16().requires_grad_(), torch.randint(0, V, (6,), device=device)
    true = F.cross_entropy(x.double(), y, reduction=reduction)
    losses = {
        loss_dtype: fused_cross_entropy(
            x, y, reduction=reduction, loss_dtype=loss_dtype, grad_in_forward=grad_in_forward, backend=backend
        )
        for loss_dtype in (None, torch.float32, torch.float64)
    }
    torch.testing.assert_close(losses[torch.float32], true.float(), rtol=1e-6, atol=0)
    assert losses[torch.float64].dtype == torch.float64
    assert losses[None].dtype == torch.bfloat16
    torch.testing.assert_close(losses[None], losses[torch.float32].bfloat16(), rtol=2**-7, atol=0)
    assert not torch.equal(losses[None].float(), losses[torch.float32])
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in losses.values()]
    assert torch.equal(gradients[0], gradients[1])


def test_modules_and_causal_losses(backend, device):
    x, y = torch.randn(1, 6, V, device=device).bfloat16(), torch.randint(0, V, (1, 6), device=device)
    h, w = torch.randn(1, 6, D, device=device).bfloat16(), torch.randn(V, D, device=device).bfloat16()
    linear = FusedLinearCrossEntropyLoss(
        D, V, dtype=torch.bfloat16, device=device, loss_dtype=torch.float32, backend=backend
    )
    criterion = FusedCrossEntropyLoss(loss_dtype=torch.float32, backend=backend)
    assert linear(h, y).dtype == criterion(x[0], y[0]).dtype == torch.float32
    for loss in (
        lambda **options: fused_causal_lm_loss(x, y, backend=backend, **options),
        lambda **options: fused_linear_causal_lm_loss(h, w, y, backend=backend, **options),
    ):
        assert loss().dtype == torch.float32  # as models of transformers have it
        assert loss(loss_dtype=torch.bfloat16).dtype == torch.bfloat16
        torch.testing.assert_close(loss(loss_dtype=torch.bfloat16).float(), loss(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("loss_dtype", [torch.int64, "float32"], ids=str)
def test_a_loss_dtype_is_floating(loss_dtype):
    with pytest.raises(TypeError, match=f"loss_dtype: expected a floating-point torch.dtype or None.*{loss_dtype}"):
        fused_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), loss_dtype=loss_dtype)
    with pytest.raises(TypeError, match="loss_dtype"):
        FusedLinearCrossEntropyLoss(2, 3, loss_dtype=loss_dtype)
