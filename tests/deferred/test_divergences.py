"""The divergence of a student from a constant teacher, both deferred, is computed by the kernels of distillation."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.deferred import defer, divergences, product
from fused_ignore_ce.deferred.settings import Settings
from fused_ignore_ce.deferred.shared_state import SharedState

ROWS, WIDTH, TEACHER_WIDTH, V = 6, 8, 5, 13


def by_rows(log_q, log_p):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


#: name -> the loss of the student's logits x and the teacher's y, and the divergence that it is
FUSED = {
    "rows": (lambda x, y: by_rows(x.log_softmax(-1), y.log_softmax(-1)), "forward_kl"),
    "probabilities": (lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1), "forward_kl"),
    "exp of log_softmax": (
        lambda x, y: F.kl_div(x.log_softmax(-1), y.log_softmax(-1).exp(), reduction="none").mean(-1),
        "forward_kl",
    ),
    "written out": (
        lambda x, y: (y.softmax(-1) * (y.log_softmax(-1) - x.log_softmax(-1))).sum(-1, keepdim=True),
        "forward_kl",
    ),
    "written out, the other way round": (
        lambda x, y: torch.sum((y.log_softmax(-1) - x.log_softmax(-1)) * y.log_softmax(-1).exp(), dim=-1),
        "forward_kl",
    ),
    "temperature": (lambda x, y: by_rows((x / 3.0).log_softmax(-1), (y / 3.0).log_softmax(-1)) * 9.0, "forward_kl"),
    "softcaps": (
        lambda x, y: by_rows((x / 4).tanh().mul(4).log_softmax(-1), ((y / 2).tanh() * 2 / 0.7).log_softmax(-1)),
        "forward_kl",
    ),
    "shifted and masked": (
        lambda x, y: (by_rows(x[1:].log_softmax(-1), y[1:].log_softmax(-1)) * torch.arange(ROWS - 1)).sum(),
        "forward_kl",
    ),
    "upcast": (lambda x, y: by_rows(x.float().log_softmax(-1), y.float().log_softmax(-1)), "forward_kl"),
    "batchmean": (
        lambda x, y: F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True),
        "forward_kl",
    ),
    "sum": (lambda x, y: torch.nn.KLDivLoss(reduction="sum")(x.log_softmax(-1), y.softmax(-1)), "forward_kl"),
    "reverse": (lambda x, y: by_rows(y.log_softmax(-1), x.log_softmax(-1)), "reverse_kl"),
    "reverse, written out": (
        lambda x, y: (x.softmax(-1) * (x.log_softmax(-1) - y.log_softmax(-1))).sum(-1),
        "reverse_kl",
    ),
    "reverse, sum": (
        lambda x, y: F.kl_div(y.log_softmax(-1), x.log_softmax(-1), reduction="sum", log_target=True),
        "reverse_kl",
    ),
}


@pytest.fixture
def taken(monkeypatch):
    """The keywords of each call of the linear distillation loss."""
    calls, original = [], divergences.fused_linear_distillation_loss

    def spy(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(divergences, "fused_linear_distillation_loss", spy)
    return calls


@pytest.fixture
def without_logits(monkeypatch):
    """Any other product of a head fails the test."""

    def refuse(self):
        raise AssertionError("logits were computed")

    monkeypatch.setattr(product.Product, "logits", refuse)


def heads(dtype=torch.float32, teacher_dtype=None):
    """The student's hidden states, head and bias, and those of the teacher."""
    shapes = [(ROWS, WIDTH), (V, WIDTH), (V,)], [(ROWS, TEACHER_WIDTH), (V, TEACHER_WIDTH), (V,)]
    student = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes[0]]
    return student, [torch.randn(*shape, dtype=teacher_dtype or dtype) for shape in shapes[1]]


def check(value, no_worse, student, teacher, via=None):
    plain = value(F.linear(*student), F.linear(*teacher))
    wide = [t.detach().double().requires_grad_() for t in student]
    true = value(F.linear(*wide), F.linear(*(t.double() for t in teacher)))
    ours = value(defer(*student), defer(*teacher))
    no_worse("value", ours, plain, true.double(), scale=4.0, terms=V, logits=8.0, via=via)
    upstream = torch.linspace(0.5, 2, ours.numel()).view(ours.shape)
    ways = (ours, student), (plain, student), (true, wide)
    gradients = [torch.autograd.grad(v, t, upstream.to(v.dtype)) for v, t in ways]
    for leaf, *found in zip(("hidden", "weight", "bias"), *gradients, strict=True):
        no_worse(leaf, *found, scale=4.0, terms=V, logits=8.0, via=via)


@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients(name, no_worse, taken, without_logits):
    value, kind = FUSED[name]
    operands = heads()
    value(*(defer(*side) for side in operands))
    (call,) = taken
    assert call["divergence"] == kind
    assert call["reduction"] == ("sum" if name in ("batchmean", "sum", "reverse, sum") else "none")
    check(value, no_worse, *operands)


@pytest.mark.parametrize("dtypes", [
    (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["rows", "batchmean", "reverse, sum"])
def test_dtypes(name, dtypes, no_worse, taken, without_logits):
    """The dtype of the result is that of plain code, where the two sides have dtypes that it accepts."""
    value, _ = FUSED[name]
    check(value, no_worse, *heads(*dtypes), via=min(dtypes, key=lambda dtype: dtype.itemsize))
    assert taken


def test_autocast(taken, without_logits):
    student, teacher = heads()
    with torch.autocast("cpu", torch.bfloat16):
        value = FUSED["batchmean"][0]
        ours, plain = (value(linear(*student), linear(*teacher)) for linear in (defer, F.linear))
    assert taken
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours, plain, rtol=3e-2, atol=6e-2)
    for mine, theirs in zip(*(torch.autograd.grad(v, student) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=1e-1)


NOT_FUSED = {
    "a teacher of its own probabilities": lambda x, y: (y.softmax(-1) * (y.log_softmax(-1) - x)).sum(-1),
    "other probabilities": lambda x, y: ((2 * y).softmax(-1) * (y.log_softmax(-1) - x.log_softmax(-1))).sum(-1),
    "no probabilities": lambda x, y: F.kl_div(x.log_softmax(-1), y, reduction="none").sum(-1),
    "log of no probabilities": lambda x, y: by_rows(x.log_softmax(-1), y * 2),
    "no logarithm": lambda x, y: by_rows(x, y.log_softmax(-1)),
    "probabilities of an expression": lambda x, y: by_rows(x.log_softmax(-1), y.square().log_softmax(-1)),
    "a part of the sum": lambda x, y: by_rows(x.log_softmax(-1)[..., :9], y.log_softmax(-1)[..., :9]),
    "a sum of squares": lambda x, y: (
        F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none").square().sum(-1)
    ),
    "the largest": lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none").amax(-1),
    "one plus it": lambda x, y: (1 + F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none")).sum(-1),
    "probabilities in float64": lambda x, y: (
        F.kl_div(x.log_softmax(-1, dtype=torch.float64), y.softmax(-1, dtype=torch.float64), reduction="none").sum(-1)
    ),
    "teacher's probabilities in float64": lambda x, y: (
        F.kl_div(x.log_softmax(-1), y.softmax(-1, dtype=torch.float64), reduction="none").sum(-1)
    ),
    "scaled difference": lambda x, y: (
        y.softmax(-1) * torch.sub(y.log_softmax(-1), x.log_softmax(-1), alpha=2)
    ).sum(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_only_looks_like_a_divergence(name, no_worse, taken):
    check(NOT_FUSED[name], no_worse, *heads())
    assert not taken


@pytest.mark.parametrize("name", ["rows", "batchmean"])
def test_two_students(name):
    """Neither side is constant: both get a gradient."""
    value, (student, teacher) = FUSED[name][0], heads()
    leaves = [*student, *(t.requires_grad_() for t in teacher)]
    ours, plain = (value(linear(*student), linear(*teacher)).sum() for linear in (defer, F.linear))
    for mine, theirs in zip(*(torch.autograd.grad(v, leaves) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    student, teacher = heads(torch.float64)

    def second(linear):
        value = FUSED["batchmean"][0](linear(*student), linear(*teacher))
        (first,) = torch.autograd.grad(value, student[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), student)

    torch.testing.assert_close(second(defer), second(F.linear))


def test_old_arguments_decide_the_reduction():
    """`size_average` and `reduce` are deprecated, and win over `reduction`."""
    student, teacher = heads()
    with pytest.warns(UserWarning, match="deprecated"):
        ours, plain = (
            F.kl_div(linear(*student).log_softmax(-1), linear(*teacher).softmax(-1), reduce=True, reduction="none")
            for linear in (defer, F.linear)
        )
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["rows", "batchmean", "reverse", "reverse, sum", "written out"])
@pytest.mark.parametrize("given_to", ["student", "teacher"])
def test_options_of_patch_model_reach_the_loss(name, given_to, taken, without_logits):
    student, teacher = heads(torch.bfloat16)
    options = {"logits_dtype": torch.float32, "memory_budget": 2**20, "backend": "torch"}
    shared = {given_to: SharedState(Settings(options=options))}
    value, _ = FUSED[name]
    value(defer(*student, shared=shared.get("student")), defer(*teacher, shared=shared.get("teacher")))
    (call,) = taken
    assert options.items() <= call.items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rows", "batchmean", "reverse, sum"])
def test_a_budget_that_is_too_small_for_the_loss(name, dtype, taken):
    """It is computed by tiles, which need less."""
    student, teacher = heads(dtype)
    shared = SharedState(Settings(options={"memory_budget": 500}))
    value, _ = FUSED[name]
    ours, plain = value(defer(*student, shared=shared), defer(*teacher)), value(F.linear(*student), F.linear(*teacher))
    assert not taken
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(*(torch.autograd.grad(v.sum(), student) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=8 * tolerance, atol=8 * tolerance)


def test_logits_dtype_of_a_teacher_beside_a_float64_student(taken, without_logits):
    student, teacher = heads(torch.float64, torch.bfloat16)
    shared = SharedState(Settings(options={"logits_dtype": torch.float32}))
    value, _ = FUSED["rows"]
    ours, plain = value(defer(*student), defer(*teacher, shared=shared)), value(F.linear(*student), F.linear(*teacher))
    assert taken
    torch.testing.assert_close(ours, plain, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("value", [
    lambda x, y: x.log_softmax(-1).mul(other=2.0).sum(-1),
    lambda x, y: (y.softmax(-1) * y.log_softmax(-1).sub(other=2.0)).sum(-1) + x.sum(-1),
    lambda x, y: y.softmax(-1).mul(other=2.0).sum(-1) * x.amax(-1),
])  # fmt: skip
def test_numbers_that_are_given_by_name(value, no_worse, taken):
    check(value, no_worse, *heads())
    assert not taken


@pytest.mark.parametrize("shape", [(), (V,), (1, V), (1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_constant_log_probabilities_of_fewer_dimensions(shape, reduction, no_worse):
    """ "batchmean" divides by the rows of its first argument, before that is broadcast."""
    log_q = torch.randn(shape, dtype=torch.float64)
    check(lambda x, y: F.kl_div(log_q.to(x.dtype), x.softmax(-1), reduction=reduction), no_worse, *heads())


@pytest.mark.parametrize("name", ["sum", "mean"])
def test_dtypes_of_sums(name, taken):
    """A sum of integers is one of integer terms."""
    student, teacher = heads()
    terms = [
        F.kl_div(linear(*student).log_softmax(-1), linear(*teacher).softmax(-1), reduction="none")
        for linear in (defer, F.linear)
    ]
    for dtype in [torch.float64, torch.float32, *[torch.int64] * (name == "sum")]:
        with torch.no_grad():
            torch.testing.assert_close(*(getattr(each, name)(-1, dtype=dtype) for each in terms), rtol=1e-5, atol=1e-5)
    assert len(taken) == 2


def test_a_teacher_of_inference_mode(no_worse, taken):
    student, teacher = heads()
    with torch.inference_mode():
        teacher = [t.clone() for t in teacher]
    check(FUSED["rows"][0], no_worse, student, teacher)
    assert taken


def test_the_limit_where_plain_code_has_0_times_infinity(taken):
    """Classes of probability 0 add 0 to a divergence; `F.kl_div` has NaN for classes that both sides exclude."""
    student, teacher = heads(torch.float64)
    for leaf in (student[2], teacher[2]):
        with torch.no_grad():
            leaf[:3] = -torch.inf
    value, _ = FUSED["reverse"]
    assert value(F.linear(*student), F.linear(*teacher)).isnan().all()
    ours = value(defer(*student), defer(*teacher))
    of_others = value(*(F.linear(h, w[3:], b[3:]) for h, w, b in (student, teacher)))
    torch.testing.assert_close(ours, of_others)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), student) for each in (ours, of_others)))
