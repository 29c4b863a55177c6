"""Between one block and vocabulary blocks: logits of some blocks are kept, and only the others computed again."""

import pytest
import torch

from fused_ignore_ce import fused_linear_cross_entropy, plan_linear_loss
from fused_ignore_ce.linear import calls
from fused_ignore_ce.linear.plan import LinearPlan

N, V, D = 24, 190, 16


def given(dtype):
    torch.manual_seed(0)
    h, w, b = (torch.randn(size).to(dtype).requires_grad_() for size in ((N, D), (V, D), (V,)))
    target = torch.randint(V, (N,))
    target[::5] = -100
    return (h, w, b), target


def products(monkeypatch):
    """Counts the elements of all logits that are computed."""
    counted = []
    tiles = calls.Tiles
    logits = tiles.logits
    monkeypatch.setattr(tiles, "logits", lambda self, rows, block: _noted(counted, logits(self, rows, block)))
    return counted


def _noted(counted, x):
    counted.append(x.shape[1])
    return x


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_kept_blocks_gives_the_same(dtype, kept, backend, monkeypatch):
    leaves, target = given(dtype)
    options = {"linear_bias": leaves[2], "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "backend": backend}
    whole = fused_linear_cross_entropy(*leaves[:2], target, **options)
    true = torch.autograd.grad(whole, leaves, torch.tensor(1.7).to(dtype))
    monkeypatch.setattr(calls, "choose", lambda *_: LinearPlan("vocabulary blocks", 64, 0, kept))
    counted = products(monkeypatch)
    found = fused_linear_cross_entropy(*leaves[:2], target, **options)
    gradients = torch.autograd.grad(found, leaves, torch.tensor(1.7).to(dtype))
    assert sum(counted) == V + sum([64, 64, 62][: 3 - kept])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, right in zip((found, *gradients), (whole, *true), strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance * right.abs().max().item())


def test_time_falls_with_memory():
    """At 8192 x 128256 x 4096, between the leanest plan and one block."""
    one = plan_linear_loss(8192, 128256, 4096)
    assert (one.plan, one.kept) == ("one block", 0)
    shares = []
    for budget in ("300MiB", "600MiB", "1GiB", "1800MiB"):
        plan = plan_linear_loss(8192, 128256, 4096, memory_budget=budget)
        assert plan.plan == "vocabulary blocks"
        shares.append(plan.kept * plan.chunk / 128256)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[2] > 0.25
    assert shares[3] > 0.6


def test_nothing_is_kept_where_backward_computes_the_gradients():
    for options in ({"reduction": "none"}, {"dtype": torch.float16}, {"input_grad": False, "weight_grad": False}):
        assert plan_linear_loss(8192, 128256, 4096, memory_budget="1GiB", **options).kept == 0


def test_a_real_budget():
    h, w = torch.randn(512, 8, requires_grad=True), torch.randn(20000, 8, requires_grad=True)
    target = torch.randint(20000, (512,))
    one = plan_linear_loss(512, 20000, 8, dtype=torch.float32, device="cpu")
    budget = one.bytes * 3 // 4
    plan = plan_linear_loss(512, 20000, 8, dtype=torch.float32, device="cpu", memory_budget=budget)
    assert plan.bytes <= budget
    found = fused_linear_cross_entropy(h, w, target, memory_budget=budget)
    whole = fused_linear_cross_entropy(h, w, target)
    torch.testing.assert_close(found, whole)
    for mine, right in zip(*(torch.autograd.grad(loss, (h, w)) for loss in (found, whole)), strict=True):
        torch.testing.assert_close(mine, right)
