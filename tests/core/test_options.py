"""The options that F.cross_entropy does not have, alone and combined, against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_ignore_ce import fused_cross_entropy
from fused_ignore_ce.backends import reference

MAYBE_SOFTCAP = st.one_of(st.none(), st.floats(0.5, 50.0))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_combination(dtype, backend, device, no_worse, data):
    draw = data.draw
    N, V = draw(st.sampled_from([(1, 1), (5, 3), (4, 100), (3, 2049), (2, 4100)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = (torch.randn(N, V, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1.0, 20.0]))).to(dtype)
    probs = draw(st.booleans())
    if probs:
        target = torch.rand(N, V, generator=generator, dtype=torch.float64).to(dtype)
        ignore_index = -100
    else:
        target = torch.randint(0, V, (N,), generator=generator)
        ignore_index = draw(st.sampled_from([-100, 0, V + 5, [0, -7, V - 1], {V}]))
        if draw(st.booleans()):
            target[0] = ignore_index if isinstance(ignore_index, int) else next(iter(ignore_index))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0.0, 0.3])),
        "softcap": draw(MAYBE_SOFTCAP),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
    }
    weight = (torch.rand(V, generator=generator, dtype=torch.float64) + 0.1).to(dtype) if draw(st.booleans()) else None
    if draw(st.booleans()):
        options["token_weight"] = torch.tensor([2.0, 0.0, -0.5, 1.5, 0.25])[:N]
    if reduction == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([3, 2.5, torch.tensor(7)]))

    def run(function, dtype, **extra):
        inputs = [t.to(dtype).requires_grad_() for t in ([x, target] if probs else [x])]
        w = None if weight is None else weight.to(dtype)
        loss = function(inputs[0], inputs[1] if probs else target, w, **options, **extra)
        return loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, -1.5))

    ours = run(fused_cross_entropy, dtype, backend=backend)
    ref = run(reference.cross_entropy, dtype)
    true = run(reference.cross_entropy, torch.float64)
    scale = abs(options["logit_scale"])
    largest = min(scale * float(x.detach().abs().max()), options["softcap"] or float("inf"))
    for name, *three in zip(("loss", "dx", "dprobs"), ours, ref, true, strict=False):
        no_worse(name, *three, scale=1.5 * scale, terms=V, logits=largest)


def test_softcap_is_accurate_near_zero(backend, device, no_worse):
    """tanh must not cancel for small logits."""
    x = torch.randn(4, 300, device=device) * 1e-3
    target = torch.tensor([0, 5, 299, 7], device=device)
    results = []
    for function, dtype, extra in (
        (fused_cross_entropy, torch.float32, {"backend": backend}),
        (reference.cross_entropy, torch.float32, {}),
        (reference.cross_entropy, torch.float64, {}),
    ):
        leaf = x.to(dtype).requires_grad_()
        loss = function(leaf, target, softcap=30.0, reduction="sum", **extra)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for name, *three in zip(("loss", "dx"), *results, strict=True):
        no_worse(name, *three, terms=x.shape[1])


def test_masked_lanes_are_masked_after_the_cap(backend, device):
    """C is no multiple of a block. A padding lane that went through the cap would add exp(-cap) to the sum."""
    x = torch.full((2, 37), -3.0, device=device)
    _, stats = fused_cross_entropy(x, torch.zeros(2, dtype=torch.long, device=device), softcap=1.0, return_stats=True,
                                   backend=backend)  # fmt: skip
    torch.testing.assert_close(stats.lse, torch.logsumexp(torch.tanh(x), 1))


def test_token_weight_has_a_gradient(backend, device):
    x, y = torch.randn(4, 9, device=device, dtype=torch.float64), torch.tensor([1, 2, -100, 3], device=device)
    w = torch.tensor([0.5, 2.0, 1.0, 3.0], device=device, dtype=torch.float64)
    gradients = []
    for function, extra in ((fused_cross_entropy, {"backend": backend}), (reference.cross_entropy, {})):
        leaf = w.clone().requires_grad_()
        gradients += torch.autograd.grad(function(x, y, token_weight=leaf, **extra), leaf)
    torch.testing.assert_close(*gradients)


def test_token_weight_of_ignored_rows_is_not_read(backend, device):
    x, y = torch.randn(3, 9, device=device), torch.tensor([1, -100, 3], device=device)
    w = torch.tensor([1.0, float("nan"), 2.0], device=device)
    expected = fused_cross_entropy(x, y, token_weight=w.nan_to_num(0.0), backend=backend)
    assert torch.equal(fused_cross_entropy(x, y, token_weight=w, backend=backend), expected)


def test_normalizer_tensor_replaces_the_count(backend, device):
    x, y = torch.randn(4, 9, device=device), torch.tensor([1, 2, -100, 3], device=device)
    for normalizer in (8, 8.0, torch.tensor(8, device=device), torch.tensor(8.0, device=device)):
        loss = fused_cross_entropy(x, y, normalizer=normalizer, backend=backend)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, y, reduction="sum") / 8)


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("normalizer", [0, 0.0, "tensor"])
def test_a_normalizer_of_zero_divides_by_zero(normalizer, grad_in_forward, backend, device):
    """A number and a tensor mean the same, and ignored rows get a gradient of zero even then."""
    x, y = torch.randn(4, 7, device=device, requires_grad=True), torch.tensor([1, 2, -100, 3], device=device)
    if normalizer == "tensor":
        normalizer = torch.tensor(0.0, device=device)
    loss = fused_cross_entropy(x, y, normalizer=normalizer, grad_in_forward=grad_in_forward, backend=backend)
    assert loss.isposinf()
    loss.backward()
    assert not x.grad[0].isfinite().any()
    assert (x.grad[2] == 0).all()
