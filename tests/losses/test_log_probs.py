"""`fused_linear_log_probs`: temperature after the cap, token weights, entropies with gradients; sharded, too."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_linear_log_probs

from ..distributed.test_losses import parts

N, V, D = 5, 70, 4
TEMPERATURE, CAP, SCALE = 0.7, 3.0, 1.3


def problem(device="cpu"):
    h = torch.randn(N, D, dtype=torch.float64, device=device, requires_grad=True)
    w = (2 * torch.randn(V, D, dtype=torch.float64, device=device)).requires_grad_()
    b = torch.randn(V, dtype=torch.float64, device=device, requires_grad=True)
    return h, w, b, torch.tensor([3, -100, 69, 0, 12], device=device)


def plain(h, w, b, y, cap=CAP, temperature=TEMPERATURE):
    """(log_probs, entropy), 0 at ignored rows."""
    x = SCALE * F.linear(h, w, b)
    x = x if cap is None else cap * torch.tanh(x / cap)
    log_p = (x / temperature).log_softmax(-1)
    kept = y != -100
    chosen = log_p.gather(-1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(kept, chosen, 0.0), torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0.0)


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


@pytest.mark.parametrize("plan_name", [None, "vocabulary blocks"])
@pytest.mark.parametrize("shards", [(40, 30), (5, 0, 45, 20)], ids=["2", "4, one empty"])
def test_a_sharded_vocabulary(shards, plan_name, ranks):
    *leaves, y = problem()
    h, w, b = leaves
    upstream = torch.linspace(-1.5, 2.0, N, dtype=torch.float64)
    log_probs, entropy = plain(h, w, b, y)
    dh, dw, db = torch.autograd.grad((log_probs * upstream - 0.3 * entropy * upstream.flip(0)).sum(), leaves)
    options = {"softcap": CAP, "logit_scale": SCALE, "temperature": TEMPERATURE}
    found = ranks.run(
        "log_probs_and_entropy",
        [
            {
                "ranks": len(shards),
                "tensors": {
                    "input": h.detach(), "linear_weight": w.detach()[part], "linear_bias": b.detach()[part], "target": y
                },
                "upstream": upstream, "plan": plan_name, **options,
            }
            for part in parts(shards)
        ],
    )  # fmt: skip
    for of_rank in found:
        torch.testing.assert_close(of_rank["log_probs"], log_probs.detach())
        torch.testing.assert_close(of_rank["entropy"], entropy.detach())
        torch.testing.assert_close(of_rank["input"], dh)
    torch.testing.assert_close(torch.cat([f["linear_weight"] for f in found]), dw)
    torch.testing.assert_close(torch.cat([f["linear_bias"] for f in found]), db)
