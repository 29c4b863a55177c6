"""The linear loss equals F.linear and F.cross_entropy: shapes, dtypes, options, backends and plans."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_ignore_ce import (
    fused_cross_entropy,
    fused_linear_cross_entropy,
)
from fused_ignore_ce.backends import reference

from ..helpers.linear import gradients, problem

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def linear_then(loss):
    """Makes a loss of hidden states, head and bias from `loss`, which takes logits."""
    return lambda h, w, b, *args, **options: loss(F.linear(h, w, b), *args, **options)


def ours(h, w, b, target, weight=None, **options):
    return fused_linear_cross_entropy(h, w, target, linear_bias=b, weight=weight, **options)


def compare(no_worse, call, tensors, dtype, options, scale=0.0, **extra):
    """Ours is no worse than PyTorch in the same dtype, judged by float64. Logits are below 8, see `problem`."""
    terms = max(size for t in tensors for size in t.shape)
    plain = linear_then(reference.cross_entropy)
    three = (
        gradients(lambda *leaves: call(ours, *leaves, **options, **extra), tensors),
        gradients(lambda *leaves: call(plain, *leaves, **options), tensors),
        gradients(lambda *leaves: call(plain, *leaves, **options), [t.double() for t in tensors]),
    )
    for name, *results in zip(("loss", "dh", "dw", "db", "dprobs"), *three, strict=False):
        no_worse(name, *results, terms=terms, logits=8.0, via=dtype, scale=scale)


# N, V, D: below every block and off every multiple; one row, class and feature; several chunks, blocks and launches'
# blocks of the vocabulary; D above every block size.
SHAPES = [(5, 7, 3), (1, 1, 1), (8, 64, 16), (17, 130, 33), (4, 2100, 20), (7, 61, 1100)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_pytorch(dtype, N, V, D, reduction, backend, plan, device, no_worse):
    h, w, b, y = problem(N, V, D, dtype, device=device)
    y[2::3] = -100
    compare(
        no_worse,
        lambda loss, h, w, b, **options: loss(h, w, b, y, **options),
        (h, w, b),
        dtype,
        {"reduction": reduction},
        backend=backend,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, backend, plan, device):
    h, w, b, y = problem(7, 11, 2, torch.float64, device=device)
    y[3] = -100
    q = torch.rand(7, 11, dtype=torch.float64, device=device)
    token_weight = torch.tensor([1.0, 0.5, -2.0, 1.0, 0.0, 3.0, 1.0], dtype=torch.float64, device=device)
    options = {"reduction": reduction, "label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.1, "backend": backend}

    def loss(h, w, b, target, token_weight):
        weight = torch.linspace(0.1, 1, 11, dtype=torch.float64, device=device)
        return ours(h, w, b, target, weight, token_weight=token_weight, **options)

    for target in (y, q):
        tensors = [t.requires_grad_() for t in (h, w, b)]
        floating = target.is_floating_point()
        assert torch.autograd.gradcheck(
            lambda h, w, b, *q, y=target: loss(h, w, b, q[0] if q else y, token_weight),
            [*tensors, target.requires_grad_()] if floating else tensors,
            fast_mode=True,  # random projections of the Jacobian: the interpreter is slow
        )
    kept = torch.tensor([0, 1, 2, 3, 5, 6], device=device)  # a row whose weight is 0 is ignored: the loss jumps there
    leaf = token_weight[kept].requires_grad_()
    fast = backend == "triton"
    assert torch.autograd.gradcheck(
        lambda t: loss(h, w, b, y, token_weight.index_copy(0, kept, t)), leaf, fast_mode=fast
    )


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_combination(dtype, backend, plan, device, no_worse, data):
    draw = data.draw
    N, V, D = draw(st.sampled_from([(1, 2, 1), (5, 43, 8), (4, 100, 3), (7, 300, 40)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    h, w, b, y = problem(N, V, D, dtype, bias=draw(st.booleans()), device=device)
    probs, ignore_index = draw(st.booleans()), -100
    if not probs:
        ignore_index = draw(st.sampled_from([-100, 0, V + 5, [0, -7, V - 1], {V}]))
        if draw(st.booleans()):
            y[N // 2] = ignore_index if isinstance(ignore_index, int) else next(iter(ignore_index))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 0.7, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
    }
    weight = torch.rand(V, dtype=torch.float64).add(0.1).to(device, dtype) if draw(st.booleans()) else None
    if draw(st.booleans()):
        options["token_weight"] = torch.tensor([2.0, 0.0, -0.5, 1.5, 0.25, 1.0, 1.0], device=device)[:N]
    if reduction == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([3, 2.5, torch.tensor(7)]))

    def call(loss, h, w, *rest, **options):
        rest = list(rest)
        bias = None if b is None else rest.pop(0)
        return loss(h, w, bias, rest[0] if probs else y, None if weight is None else weight.to(h.dtype), **options)

    q = torch.rand(N, V, dtype=torch.float64).to(device, dtype)
    tensors = [t for t in (h, w, b, q if probs else None) if t is not None]
    compare(no_worse, call, tensors, dtype, options, scale=1.5, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize(
    ("batch", "positions"),
    [((), ()), ((6,), ()), ((2, 3), ()), ((2, 1, 3), ()), ((0,), ()), ((4,), (2,)), ((3,), (2, 2)), ((2, 2), (3,))],
    ids=str,
)
def test_shapes(batch, positions, probs, reduction, backend, device):
    """Any leading dimensions, and the K-dimensional loss of torch's linear_cross_entropy."""
    C, D = 11, 5
    h = torch.randn(*batch, D, device=device, dtype=torch.float64)
    w = torch.randn(C, *positions, D, device=device, dtype=torch.float64)
    b = torch.randn(C, *positions, device=device, dtype=torch.float64)
    if probs:
        target = torch.rand(*batch, C, *positions, device=device, dtype=torch.float64)
    else:
        target = torch.randint(0, C, (*batch, *positions), device=device)
        target.view(-1)[1:2] = -100

    def plain(h, w, b):
        x = (torch.einsum("bd,cpd->bcp", h.reshape(-1, D), w.reshape(C, -1, D)) + b.reshape(C, -1)).contiguous()
        flat = target.reshape(x.shape) if probs else target.reshape(x.shape[0], x.shape[2])
        loss = F.cross_entropy(x, flat, reduction=reduction, label_smoothing=0.1)
        return loss.view((*batch, *positions)) if reduction == "none" else loss

    def fused(h, w, b):
        return fused_linear_cross_entropy(
            h, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1, backend=backend
        )

    torch.testing.assert_close(gradients(fused, (h, w, b)), gradients(plain, (h, w, b)), equal_nan=True)


def test_torch_is_a_drop_in(device):
    """The same call as torch's own, where this PyTorch has one."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no F.linear_cross_entropy")
    h, w, b, y = problem(6, 20, 8, device=device)
    y[1] = 3
    for options in ({}, {"ignore_index": None}, {"ignore_index": 3, "label_smoothing": 0.1}, {"reduction": "none"}):
        expected = F.linear_cross_entropy(h, w, y, linear_bias=b, weight=torch.linspace(0.1, 1, 20), **options)
        loss = fused_linear_cross_entropy(h, w, y, linear_bias=b, weight=torch.linspace(0.1, 1, 20), **options)
        torch.testing.assert_close(loss, expected)


def test_strides(backend, plan, device):
    """Transposed hidden states and head, expanded upstream gradients, a target that is a column."""
    h = torch.randn(9, 10, device=device).t()[:, ::1]
    w = torch.randn(9, 80, device=device).t()
    y = torch.randint(0, 80, (10, 2), device=device)[:, 1]
    expected = gradients(lambda h, w: F.cross_entropy(F.linear(h, w), y), (h, w))
    found = gradients(lambda h, w: fused_linear_cross_entropy(h, w, y, backend=backend), (h, w))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_stats_without_logits(probs, share, backend, plan, device):
    h, w, b, y = problem(12, 90, 6, device=device)
    token_weight = torch.ones(12, device=device)
    token_weight[: round(12 * share)] = 0
    target = y
    y[6:] = F.linear(h, w, b)[6:].argmax(1)
    assert y[6:].max() > 71, "the last block of the vocabulary has no prediction"
    if probs:
        target = F.one_hot(y, 90).float()
    options = {"token_weight": token_weight, "softcap": 2.0, "return_stats": True, "backend": backend}
    loss, stats = ours(h.requires_grad_(), w.requires_grad_(), b, target, **options)
    expected_loss, expected = fused_cross_entropy(F.linear(h, w, b), target, **options)
    torch.testing.assert_close(loss, expected_loss, equal_nan=True)
    for field, value in zip(stats, expected, strict=True):
        torch.testing.assert_close(field, value)
        assert not field.requires_grad
    assert share == 1.0 or stats.correct[6:].all()
