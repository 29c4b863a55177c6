"""Class weights beside other options: they do not scale the z-loss, and may be float32 with 16-bit logits."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy
from fused_ignore_ce.backends import reference

N, V, D = 6, 70, 5
Z = 0.05


def of_logits(h, w, y, weight, **options):
    return fused_cross_entropy(F.linear(h, w), y, weight, **options)


def of_logits_in_forward(h, w, y, weight, **options):
    return fused_cross_entropy(F.linear(h, w), y, weight, grad_in_forward=True, **options)


def of_hidden_states(h, w, y, weight, **options):
    return fused_linear_cross_entropy(h, w, y, weight=weight, **options)


LOSSES = pytest.mark.parametrize("loss", [of_logits, of_logits_in_forward, of_hidden_states], ids=lambda f: f.__name__)


def hidden_problem(device):
    h = torch.randn(N, D, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(V, D, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randint(0, V, (N,), device=device)
    y[2] = -100
    return h, w, y, torch.rand(V, dtype=torch.float64, device=device) + 0.5


@LOSSES
@pytest.mark.parametrize("token_weights", [False, True], ids=["", "token weights"])
def test_the_z_loss_of_a_mean_is_divided_by_the_kept_rows(loss, token_weights, backend, device):
    h, w, y, weight = hidden_problem(device)
    share = torch.rand(N, dtype=torch.float64, device=device) + 0.1 if token_weights else None
    found = loss(h, w, y, weight, z_loss=Z, token_weight=share, backend=backend)
    x = F.linear(h, w)
    counted = (y != -100) * (1.0 if share is None else share)
    rows = F.cross_entropy(x, y, weight, reduction="none") * (1.0 if share is None else share)
    expected = rows.sum() / (weight[y.clamp(min=0)] * counted).sum()
    expected = expected + Z * (x.logsumexp(1) ** 2 * counted).sum() / counted.sum()
    torch.testing.assert_close(found, expected)
    # The reference is what sharded vocabularies are compared with.
    judged = reference.cross_entropy(x, y, weight, z_loss=Z, token_weight=share)
    torch.testing.assert_close(judged, expected)
    for ours, true in zip(
        torch.autograd.grad(found, (h, w), torch.tensor(-1.5).to(found)),
        torch.autograd.grad(expected, (h, w), torch.tensor(-1.5).to(found)),
        strict=True,
    ):
        torch.testing.assert_close(ours, true)


@LOSSES
def test_a_scale_of_the_class_weights_changes_nothing(loss, backend, device):
    h, w, y, weight = hidden_problem(device)
    one, ten = (loss(h, w, y, scale * weight, z_loss=Z, backend=backend) for scale in (1.0, 10.0))
    torch.testing.assert_close(one, ten)
    assert (one - loss(h, w, y, weight, backend=backend)).abs() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_in_forward", [False, True], ids=["", "grad_in_forward"])
def test_float32_class_weights_are_not_rounded(grad_in_forward, dtype, backend, device):
    """With smoothing, `p * sum(q) - q` cancels, so that a rounded weight shows in single gradients."""
    x, y = torch.randn(8, 1000, device=device).to(dtype), torch.randint(0, 1000, (8,), device=device)
    weight = torch.rand(1000, device=device) + 0.1
    options = {"label_smoothing": 0.5, "reduction": "sum"}

    def gradient(function, x, weight, **more):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, y, weight, **options, **more), leaf)[0].double()

    true = gradient(reference.cross_entropy, x.double(), weight.double())
    ours = gradient(fused_cross_entropy, x, weight, grad_in_forward=grad_in_forward, backend=backend)
    rounded = gradient(fused_cross_entropy, x, weight.to(dtype), backend=backend)
    # Half a unit in the last place of the result, a whole one in the interpreter, and float32's errors before it.
    allowed = torch.finfo(dtype).eps * true.abs() + 3e-7 * true.abs().max() + torch.finfo(dtype).smallest_normal / 2**10
    assert ((ours - true).abs() <= allowed).all()
    assert ((rounded - true).abs() > allowed).any()


def test_float32_class_weights_with_hidden_states(backend, device):
    """Products of small integers are exact in bfloat16, so that float64 has the same logits."""
    h = torch.randint(-2, 3, (N, D), device=device).bfloat16().requires_grad_()
    w = torch.randint(-2, 3, (V, D), device=device).bfloat16().requires_grad_()
    y, weight = torch.randint(0, V, (N,), device=device), torch.rand(V, device=device) + 0.1
    loss = fused_linear_cross_entropy(h, w, y, weight=weight, loss_dtype=torch.float32, backend=backend)
    expected = F.cross_entropy(F.linear(h.double(), w.double()), y, weight.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for ours, true in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(expected, (h, w)), strict=True):
        assert (ours.double() - true.double()).abs().max() <= 2**-7 * true.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_of_class_weights_remain_an_error(dtype, device):
    x, y = torch.randn(3, 5, device=device).bfloat16(), torch.tensor([1, 2, 3], device=device)
    with pytest.raises(RuntimeError, match="weight: expected dtype torch.bfloat16"):
        fused_cross_entropy(x, y, torch.ones(5, dtype=dtype, device=device))
