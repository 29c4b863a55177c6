"""The distillation losses: values and gradients against the reference in float64, and all that is refused."""

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

N, V, D, E, K = 7, 23, 5, 6, 4
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5, "scale_by_temperature": True},
    "hard labels": {"alpha": 0.3, "temperature": 0.5},
    "caps": {"softcap": 3.0, "logit_scale": 1.3, "teacher_softcap": 4.0, "teacher_logit_scale": 0.7, "alpha": 0.6},
}
TARGET = torch.tensor([3, 0, -100, 22, 5, -100, 1])


def tensors(dtype=torch.float64, seed=0):
    """Student's and teacher's hidden states, heads and biases."""
    torch.manual_seed(seed)
    sizes = (N, D), (V, D), (V,), (N, E), (V, E), (V,)
    made = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    return [t.requires_grad_() for t in made[:3]] + made[3:]


def logits_of(h, w, b):
    return F.linear(h.double(), w.double(), b.double())


def reduced(rows, reduction, kept=5):
    return {"none": lambda: rows, "sum": rows.sum, "mean": lambda: rows.sum() / kept}[reduction]()


def gradients(loss, leaves, seed=1):
    """Of the loss with an upstream gradient that is not 1, called twice."""
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    return first


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
def test_top_k(divergence, tail, temperature, alpha):
    h, w, b, *teacher = tensors()
    log_p, ids = logits_of(*teacher).log_softmax(-1).topk(K)
    options = {"temperature": temperature, "alpha": alpha, "tail": tail}
    rows = reference.distillation_rows(
        logits_of(h, w, b), log_p, TARGET, ids=ids, divergence_name=divergence, **options
    )
    true = [rows.sum() / 5, *gradients(rows.sum() / 5, (h, w, b))]
    loss = fused_top_k_distillation_loss(h, w, ids, log_p, TARGET, linear_bias=b, divergence=divergence, **options)
    for mine, right in zip([loss, *gradients(loss, (h, w, b))], true, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_all_classes_in_top_k_are_the_whole_loss():
    h, w, b, *teacher = tensors()
    log_p = logits_of(*teacher).log_softmax(-1)
    ids = torch.stack([torch.randperm(V) for _ in range(N)])
    whole = fused_linear_distillation_loss(h, w, *teacher[:2], TARGET, linear_bias=b, teacher_bias=teacher[2])
    true = gradients(whole, (h, w, b))
    for tail in ("bucket", "renormalise"):
        found = fused_top_k_distillation_loss(h, w, ids, log_p.gather(1, ids), TARGET, tail=tail, linear_bias=b)
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
    )  # fmt: skip
    torch.testing.assert_close(of_logits, loss)
    assert not torch.autograd.grad(of_logits, x)[0][~kept].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_are_masked_on_both_sides(divergence, backend):
    h, w, b, *teacher = tensors()
    x, t = logits_of(h, w, b).detach(), logits_of(*teacher)
    some = torch.arange(V) % 3 > 0
    whole, rest = x.masked_fill(~some, -torch.inf).requires_grad_(), x[:, some].requires_grad_()
    options = {"divergence": divergence, "backend": backend}
    masked = fused_distillation_loss(whole, t.masked_fill(~some, -torch.inf), **options)
    alone = fused_distillation_loss(rest, t[:, some], **options)
    torch.testing.assert_close(masked, alone)
    gradient = torch.autograd.grad(masked, whole)[0]
    torch.testing.assert_close(gradient[:, some], torch.autograd.grad(alone, rest)[0])
    assert not gradient[:, ~some].any()


def test_a_class_that_only_the_teacher_has(backend):
    x, t = torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)
    loss = functools.partial(fused_distillation_loss, backend=backend)
    assert loss(x, t).item() == math.inf
    assert loss(t, x).item() == pytest.approx(math.log(2))
    assert loss(t, x, divergence="reverse_kl").item() == math.inf
    assert loss(x, t, divergence="jsd").item() < math.log(2)


def test_the_same_distribution_is_at_no_distance(backend):
    h, w, b, *_ = tensors()
    for divergence in DIVERGENCES:
        loss = fused_linear_distillation_loss(
            h, w, h, w, linear_bias=b, teacher_bias=b, divergence=divergence, temperature=3.0, backend=backend
        )
        assert abs(loss.item()) < 1e-15
        assert gradients(loss, (h,))[0].abs().max() < 1e-15


def test_equal_logits_of_any_size_are_equal(backend):
    """Relative to logits of 3e38, their number is far below the last digit of the sum's logarithm."""
    x = torch.full((1, 4), -3e38, requires_grad=True)
    loss = fused_distillation_loss(x, torch.zeros(1, 4), torch.tensor([1]), alpha=0.5, backend=backend)
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.tensor([[0.125, -0.375, 0.125, 0.125]]))


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction, backend):
    h, w, _b, *teacher = tensors(torch.float32)
    log_p, ids = F.linear(*teacher).log_softmax(-1).topk(K)
    options = {"reduction": reduction, "backend": backend}
    losses = [
        lambda: fused_linear_distillation_loss(h, w, *teacher[:2], TARGET, alpha=0.5, **options).sum(),
        lambda: fused_distillation_loss(F.linear(h, w), F.linear(*teacher[:2]), TARGET, **options).sum(),
        lambda: fused_top_k_distillation_loss(h, w, ids, log_p, TARGET, reduction=reduction).sum(),
    ]
    for loss in losses if backend == "torch" else losses[:2]:
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


def test_second_derivatives_are_refused():
    h, w, _b, *teacher = tensors()
    for loss in (
        fused_linear_distillation_loss(h, w, *teacher[:2]),
        fused_distillation_loss(F.linear(h, w), F.linear(*teacher[:2])),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
            torch.autograd.grad(loss, h, create_graph=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence: expected one of"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta: expected a number between 0 and 1"),
        ({"alpha": 1.5}, ValueError, r"alpha: expected a number in \[0, 1\]"),
        ({"alpha": 0.5, "target": None}, ValueError, "target: expected class indices, as alpha=0.5"),
        ({"scale_by_temperature": 1}, TypeError, "scale_by_temperature: expected True or False"),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap: expected a number above 0"),
        ({"target": TARGET[:3]}, ValueError, r"target: expected shape \(7,\)"),
        ({"target": TARGET.float()}, TypeError, "target: expected dtype int64"),
        ({"alpha": 0.5, "target": torch.where(TARGET == 22, 24, TARGET)}, IndexError, "target 24 is out of bounds"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"process_group": object()}, NotImplementedError, "process_group: distillation"),
        ({"temprature": 2.0}, TypeError, "temprature"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_options_that_are_refused(options, error, message):
    h, w, _b, *teacher = tensors()
    target = options.get("target", TARGET)
    options = {name: value for name, value in options.items() if name != "target"}
    with pytest.raises(error, match=message):
        fused_linear_distillation_loss(h, w, *teacher[:2], target, **options)
    with pytest.raises(error, match=message):
        fused_distillation_loss(F.linear(h, w), F.linear(*teacher[:2]), target, **options)


def test_tensors_that_are_refused():
    h, w, _b, th, tw, tb = tensors()
    ids, log_p = torch.zeros(N, K, dtype=torch.int64), torch.full((N, K), -2.0, dtype=torch.float64)
    for error, message, call in (
        (ValueError, r"teacher_weight: .*23 classes, got 20.*\[:20\]",
         lambda: fused_linear_distillation_loss(h, w, th, tw[:20])),
        (ValueError, "teacher_input: .*23 classes, got 20",
         lambda: fused_distillation_loss(h @ w.T, (th @ tw.T)[:, :20])),
        (ValueError, "teacher_input: expected the tokens of input",
         lambda: fused_linear_distillation_loss(h, w, th[:3], tw)),
        (RuntimeError, r"teacher_weight: expected shape \(V, 6\)",
         lambda: fused_linear_distillation_loss(h, w, th, tw[:, :4])),
        (RuntimeError, "teacher_weight: expected dtype", lambda: fused_linear_distillation_loss(h, w, th, tw.float())),
        (TypeError, "pass its weight", lambda: fused_linear_distillation_loss(h, w, th, torch.nn.Linear(E, V))),
        (ValueError, "teacher_bias: .*23 classes",
         lambda: fused_linear_distillation_loss(h, w, th, tw, teacher_bias=tb[:2])),
        (IndexError, "teacher_ids: .*got 23", lambda: fused_top_k_distillation_loss(h, w, ids + V, log_p)),
        (ValueError, "teacher_log_probs: .*above 0", lambda: fused_top_k_distillation_loss(h, w, ids, -log_p)),
        (ValueError, "teacher_log_probs: expected the shape",
         lambda: fused_top_k_distillation_loss(h, w, ids, log_p[:, :2])),
        (TypeError, "teacher_ids: expected dtype int64", lambda: fused_top_k_distillation_loss(h, w, ids.int(), log_p)),
        (NotImplementedError, "backend: there is no Triton kernel for a teacher that is known by its likeliest classes",
         lambda: fused_top_k_distillation_loss(h, w, ids, log_p, backend="triton")),
        (ValueError, "tail: expected one of", lambda: fused_top_k_distillation_loss(h, w, ids, log_p, tail="drop")),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


EDGES = {
    "large and close": ([1e10, 1e10, 1e10 - 4096], [0.0, 1.0, 2.0], {}),
    "the largest": ([3e38, -3e38, 0.0], [3e38, 3e38 - 1e33, 0.0], {"temperature": 0.5}),
    "both ends": ([3e38, -3e38, 0.0], [3.0, 0.0, 0.0], {"alpha": 0.9}),
    "of a wider teacher": ([0.0, 1.0, 2.0], [1e300, 1e300, 0.0], {}),
    "a cross entropy alone": ([0.0, 0.0, -torch.inf], [0.0, 1.0, 2.0], {"alpha": 0.0}),
}


@pytest.mark.parametrize(("mine", "theirs", "options"), EDGES.values(), ids=EDGES)
def test_logits_at_the_edges(mine, theirs, options):
    x, t = torch.tensor([mine], requires_grad=True), torch.tensor([theirs], dtype=torch.float64)
    wide, y = x.detach().double().requires_grad_(), torch.tensor([0])
    rows = reference.distillation_rows(wide, t, y, **options) if options.get("alpha") != 0 else F.cross_entropy(wide, y)
    loss = fused_distillation_loss(x, t, y, **options)
    torch.testing.assert_close(loss, rows.sum().float())
    true = torch.autograd.grad(rows.sum(), wide)[0].nan_to_num()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], true.float(), rtol=1e-5, atol=1e-6)


def test_other_classes_that_are_far_below_the_one_of_the_teacher():
    """Their shares of the rest come from their logits; log-probabilities are too far from 0 to tell them apart."""
    h, ids, log_p = torch.tensor([[5e9, 1.0, 0.0]], requires_grad=True), torch.tensor([[0]]), torch.tensor([[-0.5]])
    (dh,) = torch.autograd.grad(fused_top_k_distillation_loss(h, torch.eye(3), ids, log_p), h)
    rest = 1 - math.exp(-0.5)
    expected = torch.tensor([[rest, *(-rest * torch.tensor([1.0, 0.0]).softmax(0))]])
    torch.testing.assert_close(dh, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_classes_and_no_kept_rows(reduction):
    x, ignored = torch.zeros(3, 0, requires_grad=True), torch.full((3,), -100)
    for loss in (
        fused_distillation_loss(x, torch.zeros(3, 0), reduction=reduction),
        fused_linear_distillation_loss(x, torch.zeros(0, 0), torch.zeros(3, 2), torch.zeros(0, 2), reduction=reduction),
    ):
        assert torch.equal(loss, torch.zeros(3 if reduction == "none" else ()))
        assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape
    h, w = torch.zeros(3, 2), torch.zeros(4, 2)
    loss, stats = fused_linear_distillation_loss(h, w, h, w, ignored, reduction=reduction, return_stats=True)
    assert torch.equal(loss.isnan(), torch.tensor(reduction == "mean").expand_as(loss))
    assert loss.shape == (ignored.shape if reduction == "none" else ())
    assert stats.entropy.shape == ignored.shape
