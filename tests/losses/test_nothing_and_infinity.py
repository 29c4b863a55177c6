"""No classes, no weight to divide by, and upstream gradients that are not finite."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy

LOGITS = torch.randn(3, 4)
TARGET = torch.tensor([1, 1, -100])


def linear(x, target, *, grad_in_forward=False, **options):
    """The linear loss of logits: of an identity as head."""
    return fused_linear_cross_entropy(x, torch.eye(x.shape[1], dtype=x.dtype, device=x.device), target, **options)


@pytest.mark.parametrize("how", [{}, {"grad_in_forward": True}, {"return_stats": True}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.zeros(0)}], ids=["", "smooth", "weight"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_classes(reduction, options, how, backend, device):
    x, q = torch.zeros(5, 0, device=device, requires_grad=True), torch.zeros(5, 0, device=device)
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    expected = F.cross_entropy(x, q, reduction=reduction, **options)
    for loss in (fused_cross_entropy, linear):
        if loss is fused_cross_entropy or "grad_in_forward" not in how:
            found = loss(x, q, reduction=reduction, backend=backend, **options, **how)
            found = found[0] if "return_stats" in how else found
            torch.testing.assert_close(found, expected, equal_nan=True)
            assert torch.autograd.grad(found.sum(), x)[0].shape == (5, 0)


@pytest.mark.parametrize("how", [{}, {"grad_in_forward": True}, {"return_stats": True}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [fused_cross_entropy, linear])
def test_kept_weights_are_all_zero(loss, dtype, how, backend, device):
    """The smoothed loss is not 0, and divided by 0 it is NaN in PyTorch, not inf."""
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device, dtype=dtype)
    x, target = LOGITS.to(device, dtype).requires_grad_(), TARGET.to(device)
    found = loss(x, target, weight=weight, label_smoothing=0.1, backend=backend, **how)
    found = found[0] if "return_stats" in how else found
    assert F.cross_entropy(x, target, weight, label_smoothing=0.1).isnan()
    assert found.isnan()
    (dx,) = torch.autograd.grad(found, x)
    assert dx[:2].isnan().all()
    assert (dx[2] == 0).all()


@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    "options", [{}, {"grad_in_forward": True}, {"reduction": "sum"}, {"reduction": "none"}, {"z_loss": 0.1}], ids=str
)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("loss", [fused_cross_entropy, linear])
def test_an_upstream_gradient_that_is_not_finite(loss, compiled, options, upstream, backend, device):
    """Ignored rows get zeros, and no other row does, whether backward may run again or not."""
    x, target = LOGITS.to(device).requires_grad_(), TARGET.to(device)
    torch._dynamo.reset()

    def function(x):
        return loss(x, target, backend=backend, **options)

    found = (torch.compile(function, backend="aot_eager") if compiled else function)(x)
    for again in (True, False):
        (dx,) = torch.autograd.grad(found, x, torch.full_like(found, upstream), retain_graph=again)
        assert (dx[2] == 0).all()
        assert not dx[:2].isfinite().any()
