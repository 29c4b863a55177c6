"""What trainers compute from logits row by row is right, gradients included, and all logits are never held."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.deferred import DeferredLogits, affine, defer, product, reductions, tiles
from fused_ignore_ce.deferred.shared_state import SharedState

B, T, D, V = 2, 5, 8, 13
INDEX = (torch.arange(B * T).view(B, T, 1) * 5) % V
ROWS = torch.linspace(-1, 1, B * T).view(B, T, 1)
CLASSES = torch.linspace(-1, 1, V)


def entropy(x):
    log_probs = x.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def smoothed(x):
    """The loss of transformers' label smoother."""
    log_probs = -F.log_softmax(x[..., :-1, :].contiguous(), dim=-1)
    nll = log_probs.gather(dim=-1, index=INDEX[:, 1:])
    total = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(INDEX[:, 1:] > 8, 0.0)
    return 0.9 * nll + 0.1 * total / log_probs.shape[-1]


def chunked_entropy(x):
    flat = x.reshape(-1, V)
    return torch.cat([entropy(chunk) for chunk in flat.split(4, dim=0)]).reshape(B, T)


#: name -> operation that gives values per row of logits (B, T, V), without computing all logits
ROW_BY_ROW = {
    "log_softmax gather": lambda x: x.log_softmax(-1).gather(-1, INDEX).squeeze(-1),
    "torch.gather": lambda x: torch.gather(F.log_softmax(x, dim=-1), dim=-1, index=INDEX),
    "keywords": lambda x: torch.gather(input=torch.log_softmax(input=x, dim=2), dim=2, index=INDEX),
    "take_along_dim": lambda x: torch.take_along_dim(x.log_softmax(-1), INDEX, dim=-1),
    "temperature": lambda x: (x / 0.7).log_softmax(-1).gather(-1, INDEX),
    "softcap": lambda x: (3.0 * torch.tanh(x / 3.0)).log_softmax(-1).gather(-1, INDEX),
    "temperature after the softcap": lambda x: (torch.tanh(x / 3.0) * 3.0 / 0.7).log_softmax(-1).gather(-1, INDEX),
    "upcast": lambda x: x.float().log_softmax(-1).gather(-1, INDEX),
    "shifted": lambda x: x[:, :-1].log_softmax(-1).gather(-1, INDEX[:, 1:]).squeeze(-1),
    "masked rows": lambda x: x[ROWS[..., 0] > 0].log_softmax(-1).gather(-1, INDEX[ROWS > 0][:, None]),
    "some classes": lambda x: x.log_softmax(-1).gather(-1, torch.cat([INDEX, INDEX // 2], -1)),
    "logits gather": lambda x: x.gather(-1, INDEX).squeeze(-1),
    "biased logits gather": lambda x: ((x + CLASSES) * 2).tanh().gather(-1, INDEX),
    "gather minus logsumexp": lambda x: x.gather(-1, INDEX).squeeze(-1) - x.logsumexp(-1),
    "logsumexp of rows": lambda x: torch.stack([torch.logsumexp(row, dim=-1) for row in x]),
    "probability": lambda x: x.softmax(-1).gather(-1, INDEX),
    "z": lambda x: torch.logsumexp(x, dim=-1, keepdim=True) ** 2,
    "entropy": entropy,
    "entropy of chunks": chunked_entropy,
    "entropy by softmax": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(dim=-1),
    "entropy by torch.sum": lambda x: -torch.sum(F.softmax(x, dim=-1) * F.log_softmax(x, dim=-1), dim=-1),
    "entropy by logsumexp": lambda x: torch.logsumexp(x, dim=-1) - torch.sum(F.softmax(x, dim=-1) * x, dim=-1),
    "entropy by log": lambda x: -(x.softmax(-1) * (x.softmax(-1) + 1e-9).log()).sum(-1, keepdim=True),
    "label smoother": smoothed,
    "sum of log_softmax": lambda x: x.log_softmax(-1).sum(-1),
    "mean of log_softmax": lambda x: x.log_softmax(-1).mean(dim=-1),
    "softmax in float32": lambda x: x.softmax(-1, dtype=torch.float32).square().sum(-1),
    "by hand": lambda x: (x - x.max(-1, keepdim=True).values).exp().sum(-1).log(),
    "row operand": lambda x: ((x - ROWS) * 2 + CLASSES).softmax(-1).amax(-1),
    "whole operand": lambda x: (x * (ROWS * CLASSES)).sum(-1),
    "row operand gather": lambda x: (1.0 - (x * ROWS) / (CLASSES + 2)).gather(-1, INDEX),
    "masked_fill": lambda x: x.masked_fill(CLASSES > 0.5, float("-inf")).logsumexp(-1),
    "top": lambda x: x.topk(3, dim=-1).values.sum(-1),
    "largest": lambda x: x.softmax(-1).max(dim=-1)[0],
    "rows of an expression": lambda x: x.softmax(-1)[:, 1:].reshape(-1, V).square().sum(-1),
    "divergence": lambda x: _divergence(x, defer(torch.linspace(-1, 1, B * T * 3).view(B, T, 3), torch.eye(V, 3))),
    "F.kl_div": lambda x: F.kl_div(
        x.log_softmax(-1), (ROWS * CLASSES).softmax(-1), reduction="none", log_target=False
    ).sum(-1),
    "F.kl_div, batchmean": lambda x: F.kl_div(
        x.log_softmax(-1), (ROWS * CLASSES).log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "F.kl_div, reverse": lambda x: F.kl_div(
        (ROWS * CLASSES).log_softmax(-1), x.log_softmax(-1), reduction="sum", log_target=True
    ),
    "no rows": lambda x: x[:, :0].log_softmax(-1).gather(-1, INDEX[:, :0]).sum() + entropy(x[:, 2:2]).sum(),
}


def _divergence(student, teacher):
    """The divergence of a student from a teacher."""
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


@pytest.fixture(autouse=True, params=["one tile", "tiles"])
def _tiles(request, monkeypatch):
    if request.param == "tiles":
        monkeypatch.setattr(tiles, "TILE_BYTES", 4 * V * 3)


@pytest.fixture
def computed(monkeypatch):
    """The number of rows of each tile of logits that is computed."""
    rows, original = [], product.Product.logits

    def logits(self):
        rows.append(self.rows)
        return original(self)

    monkeypatch.setattr(product.Product, "logits", logits)
    return rows


def head(dtype=torch.float32):
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    return hidden, weight, bias


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_values_and_gradients(name, no_worse, computed):
    leaves = head()
    value = ROW_BY_ROW[name]
    x = defer(*leaves)
    ours = value(x)
    assert type(ours) is torch.Tensor
    assert not x.is_materialized
    if tiles.TILE_BYTES < 1000:
        assert not computed or max(computed) <= 3
    assert x._shared.fused
    plain = value(F.linear(*leaves))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = value(F.linear(*wide))
    assert (ours.shape, ours.dtype, ours.requires_grad) == (plain.shape, plain.dtype, True)
    no_worse("value", ours, plain, true.double(), scale=4.0, terms=V, logits=8.0)
    upstream = torch.linspace(0.5, 2, ours.numel()).view(ours.shape)
    grads = [
        torch.autograd.grad(v, t, u)
        for v, t, u in ((ours, leaves, upstream), (plain, leaves, upstream), (true, wide, upstream.to(true.dtype)))
    ]
    for leaf, *found in zip(("hidden", "weight", "bias"), *grads, strict=True):
        no_worse(leaf, *found, scale=4.0, terms=V, logits=8.0)


@pytest.mark.parametrize("name", ["log_softmax gather", "entropy", "gather minus logsumexp", "label smoother"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, no_worse):
    leaves = head(dtype)
    ours, plain = (ROW_BY_ROW[name](linear(*leaves)) for linear in (defer, F.linear))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = ROW_BY_ROW[name](F.linear(*wide)).double()
    no_worse("value", ours, plain, true, scale=4.0, terms=V, via=dtype)
    grads = [torch.autograd.grad(v.sum(), t) for v, t in ((ours, leaves), (plain, leaves), (true, wide))]
    for leaf, *found in zip(("hidden", "weight", "bias"), *grads, strict=True):
        no_worse(leaf, *found, scale=4.0, terms=V, via=dtype)


@pytest.mark.parametrize("name", ["log_softmax gather", "entropy", "logits gather", "label smoother"])
def test_autocast(name):
    leaves = head()
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (ROW_BY_ROW[name](linear(*leaves)) for linear in (defer, F.linear))
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=3e-2, atol=6e-2)
    grads = [torch.autograd.grad(v.sum(), leaves) for v in (ours, plain)]
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true, rtol=3e-2, atol=2e-1)


def test_autocast_to_another_dtype_than_that_of_the_logits():
    """Autocast's `cat` of the parts of tiles would refuse them."""
    leaves = head(torch.float16)
    found = []
    for linear in (defer, F.linear):
        x = linear(*leaves)
        with torch.autocast("cpu", torch.bfloat16):
            value = x.amax(-1)
            found.append([value, *torch.autograd.grad(value.sum(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_a_log_probability_is_the_fused_functions(monkeypatch):
    """Of logits that are more than a tile. In one tile, a gather has the bits that every other reader has."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * V * 2)
    calls, original = [], affine.fused_linear_log_probs
    monkeypatch.setattr(affine, "fused_linear_log_probs", lambda *a, **k: (calls.append(k), original(*a, **k))[1])
    leaves = head()
    x = defer(*leaves, shared=SharedState())
    for name in ("log_softmax gather", "temperature", "softcap", "shifted", "masked rows", "probability"):
        ROW_BY_ROW[name](x)
    assert len(calls) == 6


def test_an_index_outside_of_the_vocabulary_is_an_error_as_in_pytorch():
    index = INDEX.clone()
    for outside in (-100, V):
        index[1, 2] = outside
        for of in (lambda x: x, lambda x: x.log_softmax(-1), lambda x: x.exp()):
            with pytest.raises((IndexError, RuntimeError)):
                of(defer(*head())).gather(-1, index)


def test_logits_that_were_read_are_used():
    x = defer(*head())
    x.materialize()
    entropy(x)
    report = x._shared.recorder.report()
    assert report.fused == {}
    assert [reader.split(" (")[0] for reader in report.reads] == ["materialize"]


@pytest.mark.parametrize("name", ["argmax", "topk", "max"])
def test_what_has_no_gradient(name):
    x = defer(*head())
    found = getattr(x, name)(*((3,) if name == "topk" else (-1,)))
    plain = getattr(x.materialize(), name)(*((3,) if name == "topk" else (-1,)))
    assert type(found) is type(plain)
    for mine, true in zip(*((t,) if name == "argmax" else t for t in (found, plain)), strict=True):
        torch.testing.assert_close(mine, true)
        assert mine.requires_grad == true.requires_grad


def test_what_is_frozen_or_without_gradients():
    hidden, weight, bias = head()
    weight.requires_grad_(False)
    ours = entropy(defer(hidden, weight))
    ours.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not entropy(defer(hidden, weight, bias)).requires_grad
        x = defer(hidden, weight, bias)
    assert not entropy(x).requires_grad


@pytest.mark.parametrize("loss", [entropy, lambda x: F.cross_entropy(x.flatten(0, 1), torch.arange(10) % V)])
def test_second_derivatives(loss):
    values = [*head(torch.float64), torch.tensor(1.5, dtype=torch.float64)]

    def second(product):
        hidden, weight, bias, scale = (t.detach().clone().requires_grad_() for t in values)
        x = product(hidden, weight, bias)
        seen = []
        x.register_hook(lambda g: seen.append(g.detach().clone()))
        given = [hidden, weight, bias, scale, x]
        first = torch.autograd.grad((loss(x * scale) + x.softmax(-1).square().sum()).sum(), given, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [*first, *(t.grad for t in given[:4]), *seen]

    for mine, true in zip(second(defer), second(F.linear), strict=True):
        torch.testing.assert_close(mine, true)


def test_changed_weights_are_noticed_in_backward():
    hidden, weight, _ = head()
    value = entropy(defer(hidden, weight)).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_budget_makes_the_tiles_smaller(computed, monkeypatch):
    monkeypatch.setattr(tiles, "TENSORS", 1)
    shared = SharedState()
    shared.settings.options["memory_budget"] = 4 * V * 2
    try:
        entropy(defer(*head(), shared=shared))
    finally:
        shared.settings.options.clear()
    assert max(computed) == 2


def test_expressions_read_as_the_original():
    leaves = head()
    for operation in (lambda x: x.softmax(-1) * ROWS + x.log_softmax(-1), lambda x: x.exp().detach(), lambda x: -x):
        ours, plain = (operation(linear(*leaves)) for linear in (defer, F.linear))
        assert isinstance(ours, DeferredLogits)
        assert (ours.shape, ours.dtype, ours.requires_grad) == (plain.shape, plain.dtype, plain.requires_grad)
        torch.testing.assert_close(ours.materialize(), plain)
        if plain.requires_grad:
            grads = [torch.autograd.grad(t.sin().sum(), leaves) for t in (ours, plain)]
            for mine, true in zip(*grads, strict=True):
                torch.testing.assert_close(mine, true)


def test_every_reduction_is_tried():
    tried = {"argmin", "min", "amin", "sum", "mean", "logsumexp", "argmax", "max", "amax", "topk", "gather",
             "take_along_dim"}  # fmt: skip
    assert tried == {*reductions._SIGNATURES}
    x = defer(*head())
    for name in ("argmin", "amin", "min"):
        found, plain = (getattr(t, name)(-1) for t in (x, x.detach().clone() + 0))
        torch.testing.assert_close(found if name != "min" else found[0], plain if name != "min" else plain[0])


def test_hooks_of_the_logits_are_called_first_and_honoured():
    hidden, weight, bias = head()
    for value in (entropy, ROW_BY_ROW["shifted"], lambda x: F.cross_entropy(x.view(-1, V), INDEX.view(-1))):
        seen = []
        for linear in (defer, F.linear):
            hidden.grad, order = None, []
            upstream = hidden * 1.0
            upstream.register_hook(lambda g, order=order: order.append("hidden"))
            x = linear(upstream, weight, bias)
            x.register_hook(lambda g, order=order: order.append("logits"))
            x.register_hook(lambda g: g * 0.5)
            value(x).sum().backward()
            assert order == ["logits", "hidden"]
            seen.append(hidden.grad)
        torch.testing.assert_close(*seen)


def test_a_hook_that_only_looks_computes_nothing():
    x = defer(*head())
    shapes = []
    x.register_hook(lambda g: shapes.append(g.shape))
    entropy(x).sum().backward()
    assert shapes == [(B, T, V)]
    assert not x.is_materialized


def test_a_gradient_that_is_kept_outlives_a_step():
    hidden, weight, bias = head()
    seen = []
    for linear in (defer, F.linear):
        x = linear(hidden, weight, bias)
        x.register_hook(seen.append)
        entropy(x).sum().backward()
    with torch.no_grad():
        weight.zero_()
    torch.testing.assert_close(seen[0] * 1, seen[1])


def test_writing_to_a_part_of_an_expression_is_seen():
    for part in (lambda e: e[:, 1:], lambda e: e.detach(), lambda e: e.view(-1, V)):
        leaves = head()
        found = []
        for linear in (defer, F.linear):
            with torch.no_grad():
                e = linear(*leaves).softmax(-1)
                part(e).zero_()
            found.append(e + 0)
        torch.testing.assert_close(*found)
