"""Gradients of the linear loss: any upstream, any number of backwards, and no work that nobody needs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fused_ignore_ce import fused_linear_cross_entropy


def problem(N=20, V=90, D=8, dtype=torch.float32, device="cpu", **grad):
    h = torch.randn(N, D, dtype=torch.float64).to(device, dtype).requires_grad_(grad.get("h", True))
    w = (torch.randn(V, D, dtype=torch.float64) / D**0.5).to(device, dtype).requires_grad_(grad.get("w", True))
    y = torch.randint(0, V, (N,), device=device)
    y[::4] = -100
    return h, w, y


@pytest.mark.parametrize("upstream", [2.0, -0.3, 0.0, 1e4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_backward_is_right(reduction, upstream, backend, plan, device):
    """The second and third backward are right too. Other packages scale them twice."""
    h, w, y = problem(device=device)
    expected = F.cross_entropy(F.linear(h, w), y, reduction=reduction)
    loss = fused_linear_cross_entropy(h, w, y, reduction=reduction, backend=backend)
    for factor in (upstream, 1.0, upstream):
        given = torch.linspace(1, 2, loss.numel(), device=device).view(loss.shape) * factor
        torch.testing.assert_close(
            torch.autograd.grad(loss, (h, w), given, retain_graph=True),
            torch.autograd.grad(expected, (h, w), given, retain_graph=True),
            rtol=1e-5,
            atol=1e-6 * max(1.0, abs(factor)),
        )


def test_a_gradient_belongs_to_the_caller(plan, device):
    """Changing it in place changes no later backward, also where the upstream gradient is 1."""
    h, w, y = problem(device=device)
    loss = fused_linear_cross_entropy(h, w, y)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    expected = [g.clone() for g in first]
    for gradient in first:
        gradient.mul_(0.5)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, (h, w)), expected, strict=True))


def test_the_last_backward_needs_no_memory_and_frees_the_graph(device):
    h, w, y = problem(device=device)
    loss = fused_linear_cross_entropy(h, w, y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_float16_with_a_loss_scale(backend, plan, device, no_worse):
    """1/N folded into a stored float16 gradient would flush it to 0 before the scale of 65536 comes."""
    results = []
    for dtype, fused in ((torch.float16, True), (torch.float16, False), (torch.float64, False)):
        torch.manual_seed(0)
        h, w, y = (t.detach() for t in problem(N=32, V=4000, device=device))
        h, w = (t.to(torch.float16).to(dtype).requires_grad_() for t in (h, w * 8))  # some classes are very unlikely
        if fused:
            with torch.autocast(device, torch.float16):  # a float32 loss, which can be scaled that much
                loss = fused_linear_cross_entropy(h, w, y, backend=backend)
        else:
            loss = F.cross_entropy(F.linear(h, w).to(torch.promote_types(dtype, torch.float32)), y)
        results.append(torch.autograd.grad(loss, (h, w), torch.full_like(loss, 65536.0)))
    for name, *three in zip(("dh", "dw"), *results, strict=True):
        no_worse(name, *three, terms=4000, via=torch.float16)
    flushed = (results[0][1] == 0) & (results[1][1] != 0)
    assert flushed.sum() <= 0.001 * flushed.numel(), f"{flushed.sum()} of {flushed.numel()} flushed to 0"
    unscaled = results[2][1].abs() / 65536
    assert (unscaled < torch.finfo(torch.float16).smallest_normal / 1000).float().mean() > 0.01, "none would be flushed"


def test_bfloat16_upstream_is_not_rounded(backend, plan, device):
    """A float32 upstream gradient, as autocast's losses have, is not rounded to the weights' bfloat16."""
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter truncates casts to bfloat16, which is as wrong as what this test looks for")
    with torch.autocast(device, torch.bfloat16):
        h, w, y = problem(dtype=torch.bfloat16, device=device)
        loss = fused_linear_cross_entropy(h, w, y, backend=backend)
    assert loss.dtype == torch.float32
    once = torch.autograd.grad(loss, w, torch.tensor(1.0, device=device), retain_graph=True)[0].double()
    third = torch.autograd.grad(loss, w, torch.tensor(1 / 3, device=device))[0].double()
    near = once.abs() > once.abs().max() / 100
    ratio = (third[near] / once[near]).mean()
    assert abs(ratio - 1 / 3) < 2e-4, f"scaled by {ratio}, not by 1/3 (bfloat16's nearest is 0.3340)"


WANTED = {"both": (True, True), "frozen head": (True, False), "frozen hidden": (False, True), "none": (False, False)}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
def test_only_the_products_that_are_needed(wanted, reduction, plan, device, monkeypatch):
    """Counts the operations, which are those of kept rows only. Every wanted gradient is there and right."""
    from fused_ignore_ce.linear import tiles

    flops = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)

        def counting(*args, original=original, **kwargs):
            a, b = args[-2:]
            flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return original(*args, **kwargs)

        monkeypatch.setattr(tiles.torch, name, counting)
    original_method = torch.Tensor.addmm_

    def counting_method(out, a, b, **kwargs):
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return original_method(out, a, b, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", counting_method)
    h, w, y = problem(device=device, h=wanted[0], w=wanted[1])
    loss = fused_linear_cross_entropy(h, w, y, reduction=reduction)
    saved = loss.grad_fn is not None
    if any(wanted):
        loss.sum().backward()
    kept = int((y != -100).sum())
    once_more = any(wanted) and (reduction == "none" or plan == "vocabulary blocks")
    assert sum(flops) == 2 * kept * 90 * 8 * (1 + sum(wanted) + once_more)
    assert saved == any(wanted)
    expected_h, expected_w = h.detach().requires_grad_(), w.detach().requires_grad_()
    F.cross_entropy(F.linear(expected_h, expected_w), y, reduction=reduction).sum().backward()
    for wants, found, expected in zip(wanted, (h, w), (expected_h, expected_w), strict=True):
        if wants:
            torch.testing.assert_close(found.grad, expected.grad)
        else:
            assert found.grad is None


def test_no_grad_saves_nothing(device):
    h, w, y = problem(device=device)
    with torch.no_grad():
        loss = fused_linear_cross_entropy(h, w, y)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(h, w), y).detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_is_refused(reduction, device):
    h, w, y = problem(device=device)
    loss = fused_linear_cross_entropy(h, w, y, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph: expected False, as losses from hidden states"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_functional_transforms_are_refused(device):
    h, w, y = problem(device=device)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(lambda h: fused_linear_cross_entropy(h, w, y))(h)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(reduction, use_reentrant, backend, plan, device):
    h, w, y = problem(device=device)

    def loss(h):
        return fused_linear_cross_entropy(h * 2, w, y, reduction=reduction, backend=backend).sum()

    expected = torch.autograd.grad(loss(h), (h, w))
    checkpoint(loss, h, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close((h.grad, w.grad), expected)


def test_saved_tensors_may_live_elsewhere(plan, device):
    h, w, y = problem(device=device)
    expected = torch.autograd.grad(fused_linear_cross_entropy(h, w, y), (h, w))
    with torch.autograd.graph.save_on_cpu():
        loss = fused_linear_cross_entropy(h, w, y)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, w)), expected)


def test_tied_embeddings(backend, plan, device):
    """The head's gradient adds to the embedding's, in one leaf."""
    ids = torch.randint(0, 90, (2, 10), device=device)
    y = torch.where(ids % 3 == 0, -100, ids.roll(1))
    found = []
    for fused in (True, False):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(90, 8, device=device)
        h = torch.tanh(embedding(ids))
        if fused:
            loss = fused_linear_cross_entropy(h, embedding.weight, y, backend=backend)
        else:
            loss = F.cross_entropy(F.linear(h, embedding.weight).flatten(0, 1), y.flatten())
        loss.backward()
        found.append(embedding.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, backend, plan, device, no_worse):
    """float32 parameters, bfloat16 products, a float32 loss and float32 gradients, as F.linear and F.cross_entropy."""
    results = []
    for fused, dtype in ((True, torch.float32), (False, torch.float32), (None, torch.float64)):
        torch.manual_seed(0)
        h, w, y = problem(device=device)
        b = torch.randn(90, device=device)
        if fused is None:  # the products' operands are bfloat16 in all three
            h, w, b = (t.detach().bfloat16().to(dtype) for t in (h, w, b))
        h, w, b = (t.detach().requires_grad_() for t in (h, w, b))
        with torch.autocast(device, torch.bfloat16, enabled=fused is not None):
            if fused:
                loss = fused_linear_cross_entropy(h, w, y, linear_bias=b, reduction=reduction, backend=backend)
            else:
                x = F.linear(h, w, b)
                loss = F.cross_entropy(x.float() if x.dtype == torch.bfloat16 else x, y, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), (h, w, b))))
    for name, *three in zip(("loss", "dh", "dw", "db"), *results, strict=True):
        no_worse(name, *three, terms=90, via=torch.bfloat16)
    assert results[0][2].dtype == torch.float32


def test_deterministic(backend, plan, device):
    h, w, y = problem(N=50, V=500, dtype=torch.bfloat16, device=device)
    runs = [torch.autograd.grad(fused_linear_cross_entropy(h, w, y, backend=backend), (h, w)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_kept(reduction, backend, plan, device):
    for N in (0, 5):
        h, w, y = problem(N=N, device=device)
        y.fill_(-100)
        loss = fused_linear_cross_entropy(h, w, y, reduction=reduction, backend=backend)
        assert loss.isnan() if reduction == "mean" else (loss == 0).all()
        gradients = torch.autograd.grad(loss, (h, w), torch.ones_like(loss))
        assert all((gradient == 0).all() for gradient in gradients)


def test_ignored_rows_may_hold_anything(backend, plan, device):
    """Their NaN and inf reach no gradient, whether rows are dropped or, with probabilities, masked."""
    h, w, y = (t.detach() for t in problem(N=6, device=device))
    token_weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0], device=device)
    y[:] = torch.arange(6)
    h[1], h[4] = torch.nan, torch.inf
    clean = h.nan_to_num(0.0, 0.0)
    for target in (y, F.one_hot(y, 90).float()):
        found = []
        for hidden in (h, clean):
            leaves = hidden.clone().requires_grad_(), w.clone().requires_grad_()
            loss = fused_linear_cross_entropy(*leaves, target, token_weight=token_weight, backend=backend)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert (found[0][1][[1, 4]] == 0).all()


@pytest.mark.parametrize("plan", ["token chunks"], indirect=True)
def test_the_bias_gradient_is_summed_in_float32(plan, device):
    """A bfloat16 sum over 400 chunks stops growing where a chunk adds less than half a unit in the last place."""
    h = torch.zeros(1200, 4, dtype=torch.bfloat16, device=device)
    w, b = (torch.zeros(8, *shape, dtype=torch.bfloat16, device=device).requires_grad_() for shape in ((4,), ()))
    y = torch.zeros(1200, dtype=torch.long, device=device)
    loss = fused_linear_cross_entropy(h, w, y, linear_bias=b, reduction="sum")
    (db,) = torch.autograd.grad(loss, b)
    assert db.tolist() == [-1048.0, *[150.0] * 7]  # -1050 in bfloat16
