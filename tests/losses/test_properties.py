"""Every public function, on tensors of any layout, dtype and magnitude, is PyTorch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fused_ignore_ce

from ..helpers.drawing import DTYPES, SETTINGS, UPSTREAM, finite, head_of, index_targets, judge, negated, rows_of_logits


def of_causal(function, x, y, **options):
    return function(x, None, shift_labels=y, **options)


def of_module(module, x, y, **options):
    return module(**options)(x, y)


def of_linear(function, x, y, **options):
    return function(x, head_of(x), y, **options)


def of_linear_module(module, x, y, **options):
    V = x.shape[1]
    return module(V, V, external_weight=True, **options)(x, y, linear_weight=head_of(x))


def of_linear_causal(function, x, y, **options):
    return function(x, head_of(x), None, shift_labels=y, **options)


def of_log_probs(function, x, y, softcap, backend, **_):
    return -function(x, head_of(x), y, softcap=softcap, backend=backend)


def of_deferred(function, x, y, softcap, backend, **options):
    head = torch.nn.Linear(x.shape[1], x.shape[1], bias=False, dtype=x.dtype, device=x.device).requires_grad_(False)
    head.weight.copy_(head_of(x))
    return F.cross_entropy(function(head, backend=backend)(x), y, **options)


#: How a public function is called with logits, or with hidden states that are its logits.
CALLS = {
    "fused_cross_entropy": lambda function, x, y, **k: function(x, y, **k),
    "fused_cross_entropy, gradient in forward": lambda function, x, y, **k: function(x, y, grad_in_forward=True, **k),
    "FusedCrossEntropyLoss": of_module,
    "fused_causal_lm_loss": of_causal,
    "fused_linear_cross_entropy": of_linear,
    "FusedLinearCrossEntropyLoss": of_linear_module,
    "fused_linear_causal_lm_loss": of_linear_causal,
    "fused_linear_log_probs": of_log_probs,
    "defer_logits": of_deferred,
}
LOGITS = [
    "fused_cross_entropy",
    "fused_cross_entropy, gradient in forward",
    "FusedCrossEntropyLoss",
    "fused_causal_lm_loss",
]
NO_PROBABILITIES = ["fused_causal_lm_loss", "fused_linear_causal_lm_loss", "fused_linear_log_probs"]
#: The same of a student and a teacher.
DISTILLATIONS = {
    "fused_distillation_loss": lambda function, x, t, y, **k: function(x, t, y, **k),
    "fused_linear_distillation_loss": lambda function, x, t, y, **k: function(x, head_of(x), t, head_of(t), y, **k),
    "fused_top_k_distillation_loss": lambda function, x, t, y, **k: function(x, head_of(x), *t, y, **k),
}
ROWS, CLASSES = [0, 1, 3, 5], [0, 1, 2, 7, 40, 300]
NO_LOSSES = ["LinearPlan", "LossStats", "plan_linear_loss", "undefer_logits"]
#: They call functions that are drawn, as test_modules.py shows.
MODULES = ["FusedDistillationLoss", "FusedLinearDistillationLoss", "FusedTopKDistillationLoss"]


def test_every_public_loss_is_drawn():
    drawn = {name.split(",")[0] for name in (*CALLS, *DISTILLATIONS)}
    assert drawn == set(fused_ignore_ce.__all__) - {*NO_LOSSES, *MODULES}


def call(functions, name, *args, **options):
    return functions[name](getattr(fused_ignore_ce, name.split(",")[0]), *args, **options)


@st.composite
def problems(draw, name):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    takes_probabilities = name not in NO_PROBABILITIES
    N, V = draw(st.sampled_from(ROWS)), draw(st.sampled_from(CLASSES if takes_probabilities else CLASSES[1:]))
    x, y = rows_of_logits(draw, rng, N, V), index_targets(rng, N, V)
    if takes_probabilities and (draw(st.sampled_from([True, False, False])) or V == 0):
        y = negated(torch.rand(x.shape, generator=rng).softmax(1).to(x.dtype))
    softcap = None if name == "defer_logits" else draw(st.sampled_from([None, None, 30.0]))
    options = {"reduction": "none", "label_smoothing": 0.0, "softcap": softcap}
    if name != "fused_linear_log_probs":
        options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    return x, y, options, draw(st.sampled_from(UPSTREAM)), draw(st.booleans())


def truth(x, y, upstream, softcap, **options):
    wide = x.resolve_neg().double().requires_grad_()
    used = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    loss = F.cross_entropy(used, y.double() if y.is_floating_point() else y, **options)
    return loss.detach(), gradient(loss, wide, upstream)


def gradient(loss, x, upstream, lazy=False):
    above = torch.full_like(loss, upstream)
    return torch.autograd.grad(loss, x, negated(above) if lazy else above)[0]


def finite_or_1(upstream):
    return upstream if abs(upstream) < math.inf else 1.0


@pytest.mark.parametrize("name", CALLS)
def test_it_is_pytorch_in_float64(name, backend, device):
    @SETTINGS
    @given(problems(name))
    def check(problem):
        x, y, options, upstream, lazy_upstream = problem
        x, y = x.to(device), y.to(device)
        if name not in LOGITS:
            x = finite(x)
        true_loss, true_dx = truth(x, y, finite_or_1(upstream), **options)
        rows, _ = truth(x, y, 0.0, **{**options, "reduction": "none"})
        leaf = x.detach().requires_grad_()
        loss = call(CALLS, name, leaf, y, backend=backend, **options)
        dx = gradient(loss, leaf, upstream, lazy_upstream)
        ignored = torch.zeros_like(x, dtype=torch.bool)
        if not y.is_floating_point():
            ignored |= (y == -100).unsqueeze(1)
        true_dx.masked_fill_(x.resolve_neg() == -torch.inf, 0.0)  # PyTorch's is NaN
        judge((loss, dx), (true_loss, true_dx), rows, upstream, ignored, capped=options["softcap"] is not None)

    check()


@st.composite
def distillations(draw, name):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    of_some = name == "fused_top_k_distillation_loss"
    N, V = draw(st.sampled_from(ROWS)), draw(st.sampled_from(CLASSES[1:] if of_some else CLASSES))
    x, y = rows_of_logits(draw, rng, N, V), index_targets(rng, N, V)
    temperature = draw(st.sampled_from([1.0, 1.0, 0.5, 3.0]))
    options = {
        "divergence": draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd"])),
        "temperature": temperature,
        "alpha": draw(st.sampled_from([1.0, 1.0, 0.3, 0.0])) if V else 1.0,
        "softcap": draw(st.sampled_from([None, None, 30.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    teacher = rows_of_logits(draw, rng, N, V)
    if of_some:
        options["tail"] = draw(st.sampled_from(["bucket", "renormalise"]))
        K = draw(st.integers(1, min(V, 9)))
        values, ids = finite(teacher).double().log_softmax(1)[:, torch.randperm(V, generator=rng)].topk(K)
        if K < V:
            values = values - draw(st.sampled_from([0.1, 3.0]))  # 1 - sum(p) is not rounded away
        dtype = draw(st.sampled_from(DTYPES))
        teacher = ids, negated(values.to(dtype).clamp(min=torch.finfo(dtype).min))
    return x, teacher, y, options, draw(st.sampled_from(UPSTREAM)), draw(st.booleans())


def distilled(x, teacher, y, upstream, divergence, temperature, alpha, softcap, reduction, tail=None):
    """Loss, gradient, losses of rows and the size of their terms, in float64."""
    wide = x.resolve_neg().double().requires_grad_()
    z = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    log_q = (z / temperature).log_softmax(1)
    if tail is None:
        log_p = (teacher.resolve_neg().double() / temperature).log_softmax(1)
    else:
        ids, log_p = teacher[0], teacher[1].resolve_neg().double()
        q = log_q.gather(1, ids)
        if tail == "renormalise":
            log_p, log_q = log_p.log_softmax(1), (z / temperature).gather(1, ids).log_softmax(1)
        elif ids.shape[1] < x.shape[1]:
            others = torch.ones_like(z).scatter(1, ids, 0.0).bool()
            rest = log_q.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
            log_p = torch.cat([log_p, (1 - log_p.exp().sum(1, keepdim=True)).log()], 1)
            log_q = torch.cat([q, rest], 1)
        else:
            log_q = q

    def kl(log_a, log_b):
        a = log_a.exp()
        return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(1)

    def size(log_a):
        a = log_a.exp()
        return (a * torch.where(a > 0, log_q.abs() + log_p.abs(), 0.0)).sum(1)

    if divergence == "jsd":
        m = 0.5 * log_p.exp() + 0.5 * log_q.exp()
        log_m = torch.where(m > 0, m, 1.0).log()
        rows = 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)
    else:
        rows = kl(log_p, log_q) if divergence == "forward_kl" else kl(log_q, log_p)
    sizes = 1 + (size(log_p) if divergence != "reverse_kl" else 0) + (size(log_q) if divergence != "forward_kl" else 0)
    if alpha < 1:
        nll = F.cross_entropy(z, y, reduction="none")
        rows = alpha * rows + (1 - alpha) * nll if alpha else nll
        sizes = alpha * sizes + 1 + nll if alpha else 1 + nll
    kept = y != -100
    rows = torch.where(kept, rows, 0.0)
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]
    return loss.detach(), gradient(loss, wide, upstream), rows.detach(), sizes.detach().unsqueeze(1)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_distillation_is_its_formula_in_float64(name, device):
    @SETTINGS
    @given(distillations(name))
    def check(problem):
        x, teacher, y, options, upstream, lazy_upstream = problem
        x, y = x.to(device), y.to(device)
        if name != "fused_distillation_loss":
            x = finite(x)
        if name == "fused_top_k_distillation_loss":
            teacher = tuple(t.to(device) for t in teacher)
        else:
            teacher = (teacher if name == "fused_distillation_loss" else finite(teacher)).to(device)
        *true, rows, size = distilled(x, teacher, y, finite_or_1(upstream), **options)
        leaf = x.detach().requires_grad_()
        loss = call(DISTILLATIONS, name, leaf, teacher, y, **options)
        dx = gradient(loss, leaf, upstream, lazy_upstream)
        if (true[1].abs() > torch.finfo(x.dtype).max / 2).any():
            return
        ignored = (y == -100).unsqueeze(1).expand_as(x)
        judge((loss, dx), true, rows, upstream, ignored, capped=options["softcap"] is not None, size=size)

    check()
