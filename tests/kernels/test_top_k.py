"""Distillation from a teacher's likeliest classes, with the kernels for all others: values, edges, layouts, traffic."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

from fused_ignore_ce import fused_top_k_distillation_loss
from fused_ignore_ce.backends import divergences, top_k
from fused_ignore_ce.backends.divergences import ByRows, Teacher
from fused_ignore_ce.core.distillation import DistillationOptions
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.kernels import top_k as launchers

K = 5
MIXES = {
    "plain": {},
    "temperature": {"temperature": 2.5, "scale_by_temperature": True, "alpha": 0.3},
    "caps": {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.5, "alpha": 0.3},
    "a negative scale": {"logit_scale": -0.7, "temperature": 2.0},
    "a cross entropy alone": {"alpha": 0.0, "temperature": 2.0},
}


@pytest.fixture(params=["triton"], autouse=True)
def kernels(request, triton_kernels):
    """The parameter is for `-k triton`, which selects what runs on compiled code."""


def options_of(divergence="forward_kl", tail="bucket", softcap=None, logit_scale=1.0, **mix):
    own = LossOptions(softcap=softcap, logit_scale=logit_scale)
    return DistillationOptions(own, divergence, beta=0.3, tail=tail, **mix).checked()


def problem(N, V, dtype, device, size=3.0, classes=K):
    """Rows with logits of this size, one of them ignored and NaN. Targets are the first, the last and a named class."""
    x, other = (torch.randn(N, V, dtype=torch.float64, device=device) * size for _ in range(2))
    values, ids = (other / size * 3.0).log_softmax(1).topk(min(classes, V))
    target = torch.randint(V, (N,), device=device)
    target[:4] = torch.tensor([V - 1, -100, 0, 0], device=device)[:N]
    if N > 3:
        target[3] = ids[3, -1]
    if N > 1:
        x[1] = math.nan
    return x.to(dtype), Teacher(values, ids), target, torch.rand(N, device=device) + 0.5


def by(backend, x, teacher, target, scale, options, with_stats=False):
    """(losses, gradient, statistics) by a forward, and by a forward and backward that overwrites the logits."""
    given, backend = x.clone(), ByRows(backend.rows)
    rows, _ = backend.forward(given, teacher, target, options, with_stats=with_stats)
    assert torch.equal(given.nan_to_num(), x.nan_to_num())
    again = backend.forward_backward(scale, given, teacher, target, options, dx=given, with_stats=with_stats)
    torch.testing.assert_close(rows.loss, again.loss, rtol=0.0, atol=0.0, equal_nan=True)
    return rows.loss, given, again[1:]


def exact(x, teacher, target, scale, options, **more):
    return by(divergences, x.double(), teacher, target, scale.double(), options, **more)


@pytest.mark.parametrize("V", [24, 9008, 5003])  # one tile with its mask; whole tiles and a tail; unaligned rows
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_values_and_gradients(tail, mix, V, device):
    given = problem(5, V, torch.float64, device)
    for divergence in ("forward_kl", "reverse_kl", "jsd") if V == 24 else ("reverse_kl",):
        options = options_of(divergence, tail, **MIXES[mix])
        loss, gradient, _ = exact(*given, options)
        found = by(top_k, *given, options)
        torch.testing.assert_close(found[0], loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], gradient, rtol=1e-11, atol=1e-13)
        assert not found[1][1].any()


DTYPES = [("plain", torch.bfloat16), ("plain", torch.float16), ("temperature", torch.float32), ("caps", torch.bfloat16)]

#: Its cast to bfloat16 truncates, which costs a unit in the last place.
INTERPRETER_TRUNCATES = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize(("mix", "dtype"), DTYPES, ids=lambda v: str(v).removeprefix("torch."))
def test_no_worse_than_pytorch(mix, dtype, device, no_worse):
    V = 5000
    x, teacher, target, scale = given = problem(5, V, dtype, device)
    options = options_of("jsd", **MIXES[mix])
    true, plain = exact(*given, options), by(divergences, x.float(), teacher, target, scale, options)
    loss, gradient, _ = by(top_k, *given, options)
    no_worse("loss", loss, plain[0], true[0], terms=V, logits=10)
    via = dtype if INTERPRETER_TRUNCATES and dtype == torch.bfloat16 else None
    no_worse("gradient", gradient, plain[1].to(dtype), true[1], terms=V, logits=10, via=via)


@pytest.mark.parametrize("size", [0.01, 1e4, 1e12, 3e37])
def test_logits_of_any_size(size, device, no_worse):
    V = 300
    x, teacher, target, scale = given = problem(5, V, torch.float32, device, size=size)
    x[4] = -size  # all classes are equal
    for divergence in ("forward_kl", "reverse_kl"):
        options = options_of(divergence, temperature=2.0, alpha=0.5)
        true, plain = exact(*given, options), by(divergences, x, teacher, target, scale, options)
        loss, gradient, _ = by(top_k, *given, options)
        no_worse("loss", loss, plain[0], true[0], terms=V, logits=min(size, 1e4), scale=1.0)
        no_worse("gradient", gradient, plain[1], true[1], terms=V, logits=min(size, 1e4), scale=1.0)


def test_other_classes_of_next_to_no_probability(device):
    """Their sum is not what is left of 1, which would be rounded away."""
    x, teacher, *_ = given = problem(3, 5000, torch.float32, device, size=1.0)
    x += 1e4
    x.scatter_add_(1, teacher.ids, torch.full(teacher.ids.shape, 40.0, device=device))
    true = exact(*given, options_of())
    loss, gradient, _ = by(top_k, *given, options_of())
    assert true[0].max() > 5.0
    torch.testing.assert_close(loss.double(), true[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), true[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("mix", ["plain", "caps"])
def test_masked_classes(mix, device):
    """Logits of -inf in whole tiles and beside; a row without any other class. A cap makes numbers of them."""
    x, teacher, target, _ = given = problem(4, 8192, torch.float64, device)
    kept = x.gather(1, teacher.ids)
    x[:, :4096], x[:, 4096::3] = -math.inf, -math.inf
    x[3] = -math.inf
    x.scatter_(1, teacher.ids, kept)
    target[:] = torch.where(target == -100, target, teacher.ids[:, 0])
    options = options_of("reverse_kl", **MIXES[mix] | {"alpha": 0.5})
    for found, true in zip(by(top_k, *given, options)[:2], exact(*given, options)[:2], strict=True):
        finite = true.isfinite()
        torch.testing.assert_close(found[finite], true[finite], rtol=1e-11, atol=1e-13)
        assert finite[0].all()


def test_nan_is_not_hidden(device):
    x, teacher, target, scale = problem(4, 300, torch.float32, device)
    x[2, ~torch.isin(torch.arange(300, device=device), teacher.ids[2])] = math.nan
    loss, gradient, _ = by(top_k, x, teacher, target, scale, options_of(alpha=0.5))
    assert loss.isnan().tolist() == [False, False, True, False]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics(temperature, device):
    """They are the student's at temperature 1. Of equal logits, the first is predicted, whoever named it."""
    x, teacher, *_ = given = problem(6, 5000, torch.float32, device)
    x[0, [4321, 17, 4322]] = 30.0
    x[2, ::7] = -math.inf
    first, last = teacher.ids[3].min(), teacher.ids[4].max()
    x[3, [first, 4999]], x[4, [0, last]] = 30.0, 30.0
    options = options_of("reverse_kl", temperature=temperature)
    for found, true in zip(
        by(top_k, *given, options, with_stats=True)[2], exact(*given, options, with_stats=True)[2], strict=True
    ):
        torch.testing.assert_close(found, true.to(found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 24])
def test_one_named_class_and_all_of_them(classes, device):
    given = problem(4, 24, torch.float64, device, classes=classes)
    for tail in ("bucket", "renormalise"):
        options = options_of(tail=tail, alpha=0.5)
        for found, true in zip(by(top_k, *given, options)[:2], exact(*given, options)[:2], strict=True):
            torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-13)


def test_gradients_in_memory_of_their_own(device):
    x, teacher, target, scale = problem(4, 1000, torch.float64, device)
    options = options_of(alpha=0.5, softcap=2.0)
    before, dx = x.clone(), torch.empty(4, 1200, dtype=x.dtype, device=device)[:, 100:1100]
    ByRows(top_k.rows).backward(scale, x, teacher, target, x, options, dx=dx)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    torch.testing.assert_close(dx, exact(x, teacher, target, scale, options)[1])


def test_no_logit_is_read_where_the_other_classes_do_not_matter(device, monkeypatch):
    x, teacher, target, scale = problem(8, 9008, torch.bfloat16, device)
    for name in ("forward", "backward"):
        monkeypatch.delattr(launchers, name)
    top_k.rows(x.clone(), teacher, target, options_of(tail="renormalise"), with_stats=False, scale=scale, dx=x.clone())


def test_a_call_takes_the_kernels(device, monkeypatch):
    """`backend="triton"` reaches them, and "auto" does for CUDA tensors only."""
    taken = []
    for name in ("forward", "backward"):
        original = getattr(launchers, name)
        monkeypatch.setattr(launchers, name, lambda *a, _f=original, **k: taken.append(_f) or _f(*a, **k))
    h, w = torch.randn(4, 6, device=device).requires_grad_(), torch.randn(30, 6, device=device)
    _, (values, ids), target, _ = problem(4, 30, torch.float32, device)
    for backend in ("triton", "torch", "auto"):
        fused_top_k_distillation_loss(h, w, ids, values, target, backend=backend).backward()
        assert len(taken) == (4 if device != "cpu" and backend == "auto" else 2)
