"""`logits_dtype=torch.float32`: logits of 16-bit hidden states and heads are never rounded to 16 bits."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    FusedLinearCrossEntropyLoss,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_log_probs,
    fused_top_k_distillation_loss,
    plan_linear_loss,
)
from fused_ignore_ce.backends import reference
from fused_ignore_ce.hf import patch_model

from ..helpers.device import DEVICE
from ..helpers.hf_worker import batches, llama

N, V, D = 9, 301, 64
WIDE = {"logits_dtype": torch.float32}
#: Of log-probabilities, relative to their largest. Rounded logits are off by a thousand times as much.
BOUND = 3e-6


def given(dtype):
    torch.manual_seed(0)
    h, w = torch.randn(N, D, device=DEVICE).to(dtype), torch.randn(V, D, device=DEVICE).to(dtype) / 4
    b = torch.randn(V, device=DEVICE).to(dtype)
    target = torch.randint(V, (N,), device=DEVICE)
    target[::4] = -100
    return [t.requires_grad_() for t in (h, w, b)], target


def exact(h, w, b):
    return F.linear(h.double(), w.double(), b.double())


@pytest.mark.parametrize("budget", [None, "token chunks", "vocabulary blocks"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_probs(dtype, backend, budget, monkeypatch):
    leaves, target = given(dtype)
    if budget is not None:
        from fused_ignore_ce.linear import calls
        from fused_ignore_ce.linear.plan import LinearPlan

        plan = LinearPlan(budget, 4 if budget == "token chunks" else 64, 0)
        monkeypatch.setattr(calls, "choose", lambda *_: plan)
    h, w, b = leaves
    found, entropy = fused_linear_log_probs(h, w, target, linear_bias=b, return_entropy=True, backend=backend, **WIDE)
    log_softmax = exact(*leaves).log_softmax(-1)
    true = log_softmax.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (target != -100)
    assert (found - true).abs().max() <= BOUND * true.abs().max()
    rounded = fused_linear_log_probs(h, w, target, linear_bias=b, backend=backend)
    if DEVICE == "cuda" or dtype == torch.bfloat16:  # CPUs multiply float16 in float32, and do not round it
        assert (rounded - true).abs().max() > 30 * BOUND * true.abs().max()
    upstream = torch.linspace(-1, 2, N, device=DEVICE)
    mine = torch.autograd.grad((found * upstream).sum() + entropy.sum(), leaves)
    of_entropy = (-(log_softmax.exp() * log_softmax).sum(-1) * (target != -100)).sum()
    right = torch.autograd.grad((true * upstream).sum() + of_entropy, leaves)
    for a, c in zip(mine, right, strict=True):
        torch.testing.assert_close(a, c, rtol=2e-2, atol=2 * torch.finfo(dtype).eps * c.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy(compiled, reduction):
    (h, w, b), target = given(torch.bfloat16)

    def loss(h, w, b):
        return fused_linear_cross_entropy(
            h, w, target, linear_bias=b, reduction=reduction, loss_dtype=torch.float32, **WIDE
        )

    found = (torch.compile(loss, fullgraph=True) if compiled else loss)(h, w, b)
    true = F.cross_entropy(exact(h, w, b), target, reduction=reduction)
    assert (found - true).abs().max() <= BOUND * true.abs().max()
    mine, right = torch.autograd.grad(found.sum(), (h, w, b)), torch.autograd.grad(true.sum(), (h, w, b))
    for a, c in zip(mine, right, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, c, rtol=2e-2, atol=1e-3)


def test_the_other_losses():
    (h, w, b), target = given(torch.bfloat16)
    true = F.cross_entropy(exact(h, w, b), target).item()
    options = {"linear_bias": b, "loss_dtype": torch.float32, **WIDE}
    assert fused_linear_causal_lm_loss(h, w, None, shift_labels=target, **options).item() == pytest.approx(true, BOUND)
    module = FusedLinearCrossEntropyLoss(D, V, external_weight=True, loss_dtype=torch.float32, **WIDE)
    assert module(h, target, linear_weight=w, linear_bias=b).item() == pytest.approx(true, BOUND)
    th, tw = torch.randn(N, D, device=DEVICE).bfloat16(), torch.randn(V, D, device=DEVICE).bfloat16()
    teacher = F.linear(th.double(), tw.double())
    rows = reference.distillation_rows(exact(h, w, b), teacher, target)
    found = fused_linear_distillation_loss(h, w, th, tw, target, reduction="none", **options)
    assert (found - rows).abs().max() <= 10 * BOUND * rows.max()
    log_p, ids = teacher.log_softmax(-1).topk(8)
    rows = reference.distillation_rows(exact(h, w, b), log_p, target, ids=ids)
    found = fused_top_k_distillation_loss(h, w, ids, log_p, target, reduction="none", **options)
    assert (found - rows).abs().max() <= 10 * BOUND * rows.max()
    found.sum().backward()
    assert h.grad.dtype == torch.bfloat16


def test_a_patched_model():
    model = llama(num_hidden_layers=1).bfloat16()
    (batch,) = batches(1)
    states = model.model(batch["input_ids"]).last_hidden_state
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    true = F.cross_entropy(F.linear(states.double(), model.lm_head.weight.double()).flatten(0, 1), labels).item()
    patch_model(model, **WIDE)
    logits = model(batch["input_ids"]).logits.float().flatten(0, 1)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(true, BOUND)
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[labels != -100]
    assert -picked.mean().item() == pytest.approx(true, 1e-2)


def test_it_costs_memory_and_the_planner_knows():
    sizes = {"num_tokens": 4096, "num_classes": 32000, "num_features": 512, "device": "cpu"}
    narrow, wide = plan_linear_loss(**sizes), plan_linear_loss(**sizes, **WIDE)
    assert wide.bytes / wide.chunk > narrow.bytes / narrow.chunk


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "float32"], ids=str)
def test_other_dtypes_are_refused(dtype):
    (h, w, _), target = given(torch.bfloat16)
    with pytest.raises(ValueError, match=r"logits_dtype: expected None or torch.float32"):
        fused_linear_cross_entropy(h, w, target, logits_dtype=dtype)
    with pytest.raises(ValueError, match=r"logits_dtype: expected None or torch.float32"):
        patch_model(llama(num_hidden_layers=1), logits_dtype=dtype)
    with pytest.raises(ValueError, match=r"logits_dtype: expected None for torch.float64"):
        fused_linear_cross_entropy(h.double(), w.double(), target, **WIDE)
