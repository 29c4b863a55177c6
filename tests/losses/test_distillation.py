"""The distillation losses: values and gradients against the reference in float64, for every option."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    fused_cross_entropy,
    fused_distillation_loss,
    fused_linear_distillation_loss,
    fused_top_k_distillation_loss,
)
from fused_ignore_ce.backends import reference

from ..helpers.distillation import DIVERGENCES, TARGET, K, N, V, gradients, logits_of, tensors

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5, "scale_by_temperature": True},
    "hard labels": {"alpha": 0.3, "temperature": 0.5},
    "caps": {"softcap": 3.0, "logit_scale": 1.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.7, "alpha": 0.6},
}


def reduced(rows, reduction, kept=5):
    return {"none": lambda: rows, "sum": rows.sum, "mean": lambda: rows.sum() / kept}[reduction]()


CASES = [(torch.float64, options, reduction) for options in OPTIONS for reduction in ("mean", "sum", "none")]
CASES += [(torch.float32, "caps", "mean"), (torch.float32, "temperature", "none")]


@pytest.mark.parametrize(("dtype", "options", "reduction"), CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients(dtype, divergence, options, reduction, backend):
    h, w, b, *teacher = tensors(dtype)
    options = OPTIONS[options]
    rows = reference.distillation_rows(
        logits_of(h, w, b), logits_of(*teacher), TARGET, divergence_name=divergence, beta=0.3, **options
    )
    expected = reduced(rows, reduction)
    true = [expected, *gradients(expected, (h, w, b))]
    given = {"divergence": divergence, "beta": 0.3, "reduction": reduction, "backend": backend, **options}
    of_hidden = fused_linear_distillation_loss(
        h, w, *teacher[:2], TARGET, linear_bias=b, teacher_bias=teacher[2], **given
    )
    x = F.linear(h, w, b)
    of_logits = fused_distillation_loss(x, F.linear(*teacher), TARGET, **given)
    for loss in (of_hidden, of_logits):
        assert loss.dtype == dtype
        found = [loss, *gradients(loss, (h, w, b))]
        tolerance = 1e-11 if dtype == torch.float64 else 3e-5
        for mine, right in zip(found, true, strict=True):
            torch.testing.assert_close(mine.double(), right.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k(divergence, tail, temperature, alpha, backend):
    h, w, b, *teacher = tensors()
    log_p, ids = logits_of(*teacher).log_softmax(-1).topk(K)
    options = {"temperature": temperature, "alpha": alpha, "tail": tail}
    rows = reference.distillation_rows(
        logits_of(h, w, b), log_p, TARGET, ids=ids, divergence_name=divergence, **options
    )
    options |= {"divergence": divergence, "backend": backend}
    true = [rows.sum() / 5, *gradients(rows.sum() / 5, (h, w, b))]
    loss = fused_top_k_distillation_loss(h, w, ids, log_p, TARGET, linear_bias=b, **options)
    for mine, right in zip([loss, *gradients(loss, (h, w, b))], true, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_all_classes_in_top_k_are_the_whole_loss(backend):
    h, w, b, *teacher = tensors()
    log_p = logits_of(*teacher).log_softmax(-1)
    ids = torch.stack([torch.randperm(V) for _ in range(N)])
    whole = fused_linear_distillation_loss(h, w, *teacher[:2], TARGET, linear_bias=b, teacher_bias=teacher[2])
    true = gradients(whole, (h, w, b))
    for tail in ("bucket", "renormalise"):
        found = fused_top_k_distillation_loss(
            h, w, ids, log_p.gather(1, ids), TARGET, tail=tail, linear_bias=b, backend=backend
        )
        torch.testing.assert_close(found, whole)
        for mine, right in zip(gradients(found, (h, w, b)), true, strict=True):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_narrow_operands_are_no_worse_than_pytorch(divergence, dtype, backend):
    """Against float64 of the same operands, as far as what PyTorch computes in the same dtype, from float32 logits."""
    h, w, b, *teacher = tensors(dtype)
    exact = reference.distillation_rows(logits_of(h, w, b), logits_of(*teacher), TARGET, divergence_name=divergence)
    true = [exact.sum(), *torch.autograd.grad(exact.sum(), (h, w, b))]
    plain = reference.distillation_rows(
        F.linear(h, w, b).float(), F.linear(*teacher).float(), TARGET, divergence_name=divergence
    ).sum()
    theirs = [plain, *torch.autograd.grad(plain, (h, w, b))]
    loss = fused_linear_distillation_loss(
        h, w, *teacher[:2], TARGET, linear_bias=b, teacher_bias=teacher[2], divergence=divergence, reduction="sum",
        loss_dtype=torch.float32, backend=backend,
    )  # fmt: skip
    ours = [loss, *torch.autograd.grad(loss, (h, w, b))]
    for mine, other, right in zip(ours, theirs, true, strict=True):
        bound = (other.double() - right.double()).abs().max() + torch.finfo(dtype).eps * right.double().abs().max()
        assert (mine.double() - right.double()).abs().max() <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_tokens_reach_nothing(divergence, backend):
    h, w, b, th, tw, tb = tensors()
    kept = TARGET != -100
    with torch.no_grad():
        h[~kept], th[~kept] = math.nan, math.inf
    options = {"divergence": divergence, "alpha": 0.5, "linear_bias": b, "teacher_bias": tb, "backend": backend}
    loss = fused_linear_distillation_loss(h, w, th, tw, TARGET, **options)
    found = gradients(loss, (h, w, b))
    short = h.detach()[kept].requires_grad_()
    alone = fused_linear_distillation_loss(short, w, th[kept], tw, TARGET[kept], **options)
    torch.testing.assert_close(loss, alone)
    assert not found[0][~kept].any()
    torch.testing.assert_close(found[1], gradients(alone, (w,))[0])
    x = F.linear(h, w, b).detach().requires_grad_()
    of_logits = fused_distillation_loss(
        x, F.linear(th, tw, tb), TARGET, divergence=divergence, alpha=0.5, backend=backend
    )
    torch.testing.assert_close(of_logits, loss)
    assert not torch.autograd.grad(of_logits, x)[0][~kept].any()


def test_alpha_zero_is_the_cross_entropy(backend):
    h, w, b, *teacher = tensors()
    loss = fused_linear_distillation_loss(h, w, *teacher[:2], TARGET, alpha=0.0, linear_bias=b, backend=backend)
    plain = fused_cross_entropy(F.linear(h, w, b), TARGET)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, (w,))[0], gradients(plain, (w,))[0])


def test_the_teacher_is_a_constant_and_the_frozen_student_too():
    h, w, _b, *teacher = tensors()
    teacher = [t.requires_grad_() for t in teacher]
    fused_linear_distillation_loss(h, w.detach(), *teacher[:2], teacher_bias=teacher[2]).backward()
    assert h.grad is not None
    assert all(t.grad is None for t in (w, *teacher))


def test_token_weights_normalizer_and_nothing_kept(backend):
    h, w, _b, *teacher = tensors()
    linear, of_logits = (
        functools.partial(loss, backend=backend) for loss in (fused_linear_distillation_loss, fused_distillation_loss)
    )
    weight = torch.linspace(0.0, 2.0, N, dtype=torch.float64).requires_grad_()
    rows = reference.distillation_rows(F.linear(h, w), F.linear(*teacher[:2]), TARGET) * weight
    kept = (TARGET != -100) & (weight != 0)
    given = (h, w, *teacher[:2], TARGET)
    for found, true in (
        (linear(*given, token_weight=weight), rows.sum() / weight[kept].sum()),
        (linear(*given, token_weight=weight, normalizer=torch.tensor(11)), rows.sum() / 11),
        (linear(*given, token_weight=weight, reduction="none").sum(), rows.sum()),
        (
            of_logits(F.linear(h, w), F.linear(*teacher[:2]), TARGET, token_weight=weight),
            rows.sum() / weight[kept].sum(),
        ),
    ):
        torch.testing.assert_close(found, true)
        mine, right = (torch.autograd.grad(loss, (h, w, weight), retain_graph=True) for loss in (found, true))
        for a, b_ in zip(mine, right, strict=True):
            keep = kept if a.shape == kept.shape else slice(None)
            torch.testing.assert_close(a[keep], b_[keep])
    nothing = torch.full((N,), -100)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        loss = linear(h, w, *teacher[:2], nothing, reduction=reduction)
        torch.testing.assert_close(loss.item(), value, equal_nan=True)
        assert not any(g.any() for g in torch.autograd.grad(loss, (h, w)))


def test_statistics_are_the_students(backend):
    h, w, b, *teacher = tensors()
    options = {"alpha": 0.5, "temperature": 2.0, "return_stats": True, "backend": backend}
    loss, stats = fused_linear_distillation_loss(h, w, *teacher[:2], TARGET, linear_bias=b, **options)
    _, others = fused_distillation_loss(F.linear(h, w, b), F.linear(*teacher[:2]), TARGET, **options)
    _, true = fused_cross_entropy(F.linear(h, w, b), TARGET, return_stats=True)
    assert loss.requires_grad
    for name in ("num_tokens", "lse", "correct", "entropy", "predicted"):
        for found in (stats, others):
            torch.testing.assert_close(getattr(found, name), getattr(true, name))
    torch.testing.assert_close(stats.token_loss.sum() / 5, loss.detach())
    torch.testing.assert_close(others.token_loss, stats.token_loss)


def test_a_memory_budget_makes_chunks():
    torch.manual_seed(0)
    h, w = torch.randn(600, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    teacher = torch.randn(600, 8), torch.randn(3000, 8)
    whole = fused_linear_distillation_loss(h, w, *teacher)
    budget = "90MiB"
    chunks = fused_linear_distillation_loss(h, w, *teacher, memory_budget=budget)
    torch.testing.assert_close(chunks, whole)
    for mine, right in zip(gradients(chunks, (h, w)), gradients(whole, (h, w)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes"):
        fused_linear_distillation_loss(h, w, *teacher, memory_budget=1000)


def test_a_budget_that_is_too_small_for_backward_is_an_error_in_forward():
    h, w = torch.randn(8, 512, dtype=torch.bfloat16), torch.randn(1000, 512, dtype=torch.bfloat16)
    options = {"reduction": "none", "memory_budget": 320_000, "backend": "torch"}
    fused_linear_distillation_loss(h, w, h[:, :8], w[:, :8], **options)
    operands = h.requires_grad_(), w.requires_grad_(), h[:, :8], w[:, :8]
    with pytest.raises(ValueError, match="memory_budget: expected at least 336000 bytes"):
        fused_linear_distillation_loss(*operands, **options)
    fused_linear_distillation_loss(*operands, **options | {"memory_budget": 336_000}).sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction, backend):
    h, w, _b, *teacher = tensors(torch.float32)
    log_p, ids = F.linear(*teacher).log_softmax(-1).topk(K)
    options = {"reduction": reduction, "backend": backend}
    losses = [
        lambda: fused_linear_distillation_loss(h, w, *teacher[:2], TARGET, alpha=0.5, **options).sum(),
        lambda: fused_distillation_loss(F.linear(h, w), F.linear(*teacher[:2]), TARGET, **options).sum(),
        lambda: fused_top_k_distillation_loss(h, w, ids, log_p, TARGET, **options).sum(),
    ]
    for loss in losses:
        torch._dynamo.reset()
        plain, compiled = loss(), torch.compile(loss, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(compiled, plain)
        mine, right = torch.autograd.grad(compiled, (h, w)), torch.autograd.grad(plain, (h, w))
        for a, b_ in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b_)


def test_autocast():
    h, w, _b, *teacher = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_distillation_loss(h, w, *teacher[:2], TARGET)
    exact = fused_linear_distillation_loss(h, w, *teacher[:2], TARGET)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(loss, exact)
