"""Faults that are known from other libraries' linear losses, and that no other file tests.

Other files test the rest: a frozen hidden state, a second backward, all rows ignored and work on ignored rows in
test_gradients, targets out of range in test_errors, ignored rows under torch.compile in test_compile, leading
dimensions in losses/test_linear_cross_entropy, chunks too small for the GEMM library in test_plan.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_linear_cross_entropy, plan_linear_loss


@pytest.mark.parametrize("fused", [True, False], ids=["ours", "summed in bfloat16"])
def test_dw_is_not_summed_in_bfloat16(fused, device, monkeypatch, no_worse):
    """600 chunks whose terms have one sign: a bfloat16 accumulator stops growing at 256 terms."""
    from fused_ignore_ce.linear import calls
    from fused_ignore_ce.linear.plan import LinearPlan

    forced = LinearPlan("token chunks", 1, 0)
    monkeypatch.setattr(calls, "choose", lambda *_: forced)
    h = torch.full((600, 4), 1.0, dtype=torch.bfloat16, device=device)
    w = torch.zeros(3, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = torch.zeros(600, dtype=torch.int64, device=device)
    (ref,) = torch.autograd.grad(F.cross_entropy(F.linear(h, w), y, reduction="sum"), w)
    wide = w.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(F.linear(h.double(), wide), y, reduction="sum"), wide)
    if fused:
        (dw,) = torch.autograd.grad(fused_linear_cross_entropy(h, w, y, reduction="sum"), w)
        no_worse("dw", dw, ref, true, terms=600)
    else:  # shows that the test detects the fault
        dw = torch.zeros_like(w)
        for row in range(600):
            part = torch.autograd.grad(F.cross_entropy(F.linear(h[row : row + 1], w), y[:1]), w)[0]
            dw = dw + part
        with pytest.raises(AssertionError, match="off by"):
            no_worse("dw", dw, ref, true, terms=600)


@pytest.mark.parametrize("D", [5, 300, 1030])
def test_the_bias_counts_once_whatever_the_features(D, backend, plan, device):
    """Another package adds it once for every 256 features."""
    h, w = torch.zeros(4, D, device=device), torch.zeros(70, D, device=device)
    b = torch.linspace(-3, 3, 70, device=device).requires_grad_()
    y = torch.tensor([0, 69, 5, 7], device=device)
    loss = fused_linear_cross_entropy(h, w, y, linear_bias=b, backend=backend)
    expected = F.cross_entropy(b.expand(4, 70), y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, b)[0] for v in (loss, expected)))


@pytest.mark.parametrize("V", [37, 257])
def test_masked_lanes_are_masked_after_the_cap(V, backend, plan, device):
    """V is no multiple of a block. A padding lane that went through the cap would add exp(0) to the sum."""
    h, w = torch.full((3, 2), -4.0, device=device), torch.ones(V, 2, device=device)
    y = torch.tensor([0, V - 1, 1], device=device)
    loss = fused_linear_cross_entropy(h, w, y, softcap=1.0, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(float(V), device=device).log())


def test_nothing_is_filtered(backend, plan, device):
    """Gradients far below bfloat16's resolution of the largest are there."""
    h = torch.ones(1, 1, device=device)
    w = torch.zeros(90, 1, device=device)
    w[0] = 40.0
    w.requires_grad_()
    (dw,) = torch.autograd.grad(fused_linear_cross_entropy(h, w, torch.tensor([0], device=device), backend=backend), w)
    torch.testing.assert_close(dw[1:], torch.full_like(dw[1:], -40.0).exp(), rtol=1e-5, atol=0)


def test_a_masked_vocabulary(backend, plan, device):
    """A bias of -inf forbids classes, here whole blocks of them: their probability and gradient are 0."""
    h, w = torch.randn(5, 6, device=device, requires_grad=True), torch.randn(100, 6, device=device, requires_grad=True)
    b = torch.zeros(100, device=device)
    b[:70] = -torch.inf
    y = torch.tensor([70, 99, 80, -100, 75], device=device)
    loss = fused_linear_cross_entropy(h, w, y, linear_bias=b, backend=backend)
    expected = F.cross_entropy(F.linear(h, w[70:]), (y - 70).masked_fill(y == -100, -100))
    torch.testing.assert_close(loss, expected)
    dh, dw = torch.autograd.grad(loss, (h, w))
    torch.testing.assert_close((dh, dw), torch.autograd.grad(expected, (h, w)))
    assert (dw[:70] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_nothing_of_the_callers_is_written(grad, reduction, backend, plan, device):
    tensors = {
        "h": torch.randn(6, 5, device=device, requires_grad=grad),
        "w": torch.randn(40, 5, device=device, requires_grad=grad),
        "b": torch.randn(40, device=device, requires_grad=grad),
        "y": torch.tensor([1, -100, 39, 0, 5, -100], device=device),
        "weight": torch.rand(40, device=device),
        "token_weight": torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 1.0], device=device),
    }
    before = {name: t.detach().clone() for name, t in tensors.items()}
    h, w, b, y, weight, token_weight = tensors.values()
    loss = fused_linear_cross_entropy(
        h, w, y, linear_bias=b, weight=weight, token_weight=token_weight, reduction=reduction, backend=backend
    )
    if grad:
        torch.autograd.grad(loss.sum(), (h, w, b))
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    assert all(t._version == 0 for t in tensors.values())


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"softcap": 30.0}, {"return_stats": True}], ids=str)
def test_no_option_falls_back_to_all_logits(options, device, monkeypatch):
    """Smoothing makes another package compute them all. Here no tile is larger than planned, whatever the option."""
    from fused_ignore_ce.linear.tiles import Tiles

    tiles = []
    original = Tiles.tile
    monkeypatch.setattr(Tiles, "tile", lambda *a: tiles.append(original(*a)) or tiles[-1])
    h, w = torch.randn(64, 8, device=device, requires_grad=True), torch.randn(5000, 8, device=device)
    y = torch.randint(0, 5000, (64,), device=device)
    budget = 10**6
    chosen = plan_linear_loss(64, 5000, 8, dtype=torch.float32, device=device, memory_budget=budget, weight_grad=False)
    loss = fused_linear_cross_entropy(h, w, y, memory_budget=budget, **options)
    (loss[0] if "return_stats" in options else loss).backward()
    rows, classes = chosen.tile(64, 5000)
    assert rows * classes < 64 * 5000 / 4
    assert tiles
    assert max(t.numel() for t in tiles) == rows * classes
