"""`fused_linear_log_probs`: temperature after the cap, token weights, entropies with gradients."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_linear_log_probs

from ..helpers.linear import gradients
from ..helpers.linear import problem as linear_problem
from ..helpers.log_probs import CAP, SCALE, TEMPERATURE, N, plain, problem


def assert_same_gradients(ours, true, leaves):
    rows = torch.linspace(-1.5, 2.0, N, dtype=torch.float64, device=ours.device)
    for one, other in zip(
        torch.autograd.grad(ours, leaves, rows, retain_graph=True),
        torch.autograd.grad(true, leaves, rows, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cap", [None, CAP], ids=["", "softcap"])
def test_temperature_divides_after_the_cap(cap, backend, plan, device):
    *leaves, y = problem(device)
    h, w, b = leaves
    options = {"linear_bias": b, "softcap": cap, "logit_scale": SCALE, "backend": backend}
    ours = fused_linear_log_probs(h, w, y, temperature=TEMPERATURE, **options)
    true, _ = plain(h, w, b, y, cap)
    torch.testing.assert_close(ours, true)
    assert_same_gradients(ours, true, leaves)
    before = fused_linear_log_probs(h, w, y, **(options | {"logit_scale": SCALE / TEMPERATURE}))
    assert ((before - ours).abs().max() > 0.1) == (cap is not None)  # scaling before the cap gives something else


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), "1"], ids=str)
def test_a_temperature_is_positive_and_finite(temperature):
    h, w, _, y = problem()
    with pytest.raises((ValueError, TypeError), match="temperature: expected a"):
        fused_linear_log_probs(h, w, y, temperature=temperature)


def test_token_weights(backend, device):
    *leaves, y = problem(device)
    h, w, b = leaves
    share = torch.tensor([0.5, 3.0, 0.0, -1.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    ours = fused_linear_log_probs(h, w, y, linear_bias=b, token_weight=share, backend=backend)
    true = plain(h, w, b, y, None, SCALE)[0] * share
    torch.testing.assert_close(ours, true)
    assert_same_gradients(ours, true, leaves)
    (gradient,) = torch.autograd.grad(ours.sum(), share)
    kept = (y != -100) & (share != 0)
    torch.testing.assert_close(gradient[kept], torch.autograd.grad(true.sum(), share)[0][kept])
    assert (gradient[~kept] == 0).all()  # ignored rows


def test_entropy_has_the_gradient_of_its_formula(backend, plan, device):
    *leaves, y = problem(device)
    h, w, b = leaves
    options = {"linear_bias": b, "softcap": CAP, "logit_scale": SCALE, "temperature": TEMPERATURE, "backend": backend}
    log_probs, entropy = fused_linear_log_probs(h, w, y, return_entropy=True, **options)
    wanted, wanted_entropy = plain(h, w, b, y)
    torch.testing.assert_close(log_probs, wanted)
    torch.testing.assert_close(entropy, wanted_entropy)
    assert_same_gradients(entropy, wanted_entropy, leaves)
    assert_same_gradients(log_probs - 0.3 * entropy, wanted - 0.3 * wanted_entropy, leaves)
    *_, stats = fused_linear_log_probs(h, w, y, return_entropy=True, return_stats=True, **options)
    assert not any(t.requires_grad for t in stats)
    torch.testing.assert_close(stats.entropy, entropy.detach())
    _, stats = fused_linear_log_probs(h, w, y, return_stats=True, **options)
    torch.testing.assert_close(stats.entropy, entropy.detach())


def test_a_policy_gradient_is_compiled_without_a_break(backend, device):
    torch._dynamo.reset()
    *leaves, y = problem(device)
    h, w, b = leaves

    def loss(h, w, b):
        log_probs, entropy = fused_linear_log_probs(
            h, w, y, linear_bias=b, temperature=TEMPERATURE, return_entropy=True, backend=backend
        )
        return log_probs.sum() - 0.1 * entropy.sum()

    ours, eager = torch.compile(loss, backend="aot_eager", fullgraph=True)(h, w, b), loss(h, w, b)
    torch.testing.assert_close(ours, eager)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_bfloat16(stats, backend, plan, device):
    h, w, b, y = linear_problem(6, 70, 8, torch.bfloat16, device=device)
    h, y = h.view(2, 3, 8), y.view(2, 3)
    y[0, 1] = -100

    def fused(h, w, b):
        found = fused_linear_log_probs(
            h, w, y, linear_bias=b, logit_scale=0.5, softcap=20.0, return_stats=stats, backend=backend
        )
        return found[0] if stats else found

    def plain(h, w, b):
        x = 20 * torch.tanh(F.linear(h, w, b).double() * 0.5 / 20)
        found = x.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
        return torch.where(y == -100, 0.0, found)

    found, expected = gradients(fused, (h, w, b)), gradients(plain, (h, w, b))
    assert found[0].dtype == torch.float32
    assert found[0].shape == (2, 3)
    assert found[0][0, 1] == 0
    for name, a, e in zip(("log_probs", "dh", "dw", "db"), found, expected, strict=True):
        error = (a.double() - e.double()).abs().max()
        assert error <= 2**-7 * e.abs().max(), f"{name}: off by {error}"
    with pytest.raises(TypeError, match="target"):
        fused_linear_log_probs(h, w, torch.rand(2, 3, 70, device=device).bfloat16())
