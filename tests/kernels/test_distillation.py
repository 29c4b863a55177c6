"""The kernels of distillation, by their launchers: every walk over a row, tile, mask and layout."""

import math
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fused_ignore_ce import fused_distillation_loss
from fused_ignore_ce.backends import divergences, reference
from fused_ignore_ce.backends.divergences import Teacher
from fused_ignore_ce.core.distillation import DistillationOptions
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.kernels import distillation

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
MIXES = {
    "plain": {},
    "hard labels": {"alpha": 0.3},
    "temperature": {"temperature": 2.5, "scale_by_temperature": True, "alpha": 0.3},
    "caps": {
        "softcap": 3.0,
        "logit_scale": 1.3,
        "teacher_softcap": 4.0,
        "teacher_logit_scale": 0.7,
        "temperature": 0.5,
    },
}


@pytest.fixture(params=["triton"])
def kernels(request, triton_kernels):
    """The launchers; the parameter is for `-k triton`, which selects what runs on compiled code."""
    return distillation


def options_of(divergence, softcap=None, logit_scale=1.0, **mix):
    own = LossOptions(softcap=softcap, logit_scale=logit_scale)
    return DistillationOptions(own, divergence, beta=0.3, **mix).checked()


def truth(x, teacher, target, divergence, scale, **mix):
    """Row losses and the gradient of `sum(loss * scale)` by the reference, in the dtype of x."""
    leaf = x.detach().clone().requires_grad_()
    loss = reference.distillation_rows(leaf, teacher, target, divergence_name=divergence, beta=0.3, **mix)
    kept = target != -100
    (gradient,) = torch.autograd.grad((loss * scale.to(loss))[kept].sum(), leaf)
    return loss.detach(), torch.where(kept.unsqueeze(1), gradient, 0.0)


def by_hand(x, teacher, target, divergence, scale, **mix):
    """The same by the PyTorch backend, whose gradients are finite where autograd's have 0 * inf."""
    dx, options = torch.empty_like(x), options_of(divergence, **mix)
    rows = divergences.rows(x, Teacher(teacher), target, options, with_stats=False, scale=scale.to(x), dx=dx)
    return rows.loss, dx


def every_way(kernels, x, teacher, target, scale, options, with_stats=False):
    """(losses, gradient, statistics) by a forward and a backward launch, and one that overwrites the logits."""
    rows, saved = kernels.forward(x, Teacher(teacher), target, options, with_stats=with_stats)
    dx = torch.empty_like(x)
    kernels.backward(scale, x, Teacher(teacher), target, saved, options, dx=dx)
    inplace = x.clone()
    again = kernels.forward_backward(
        scale, inplace, Teacher(teacher), target, options, dx=inplace, with_stats=with_stats
    )
    return (rows[0], dx, rows[1:]), (again[0], inplace, again[1:])


def problem(N, V, dtype, device, teacher_dtype=None, size=3.0):
    """Rows with logits of this size, one of them ignored and NaN; targets are the first and the last class, too."""
    x, teacher = ((torch.randn(N, V, dtype=torch.float64, device=device) * size) for _ in range(2))
    target = torch.randint(V, (N,), device=device)
    target[:3] = torch.tensor([V - 1, -100, 0], device=device)[:N]
    if N > 1:
        x[1], teacher[1] = math.nan, math.inf
    return x.to(dtype), teacher.to(teacher_dtype or dtype), target, torch.rand(N, device=device) + 0.5


#: One tile with its mask; whole tiles and a tail; rows that are unaligned.
CLASSES = [24, 9008, 5003]


@pytest.mark.parametrize("V", CLASSES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients(divergence, mix, V, kernels, device):
    mix = MIXES[mix]
    x, teacher, target, scale = problem(4, V, torch.float64, device)
    loss, gradient = truth(x, teacher, target, divergence, scale, **mix)
    for found in every_way(kernels, x, teacher, target, scale.double(), options_of(divergence, **mix)):
        torch.testing.assert_close(found[0], loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], gradient, rtol=1e-11, atol=1e-13)
        assert not found[1][1].any()


DTYPES = [
    ("plain", torch.float32, torch.float32),
    ("plain", torch.bfloat16, torch.bfloat16),
    ("plain", torch.float16, torch.float32),
    ("temperature", torch.float32, torch.bfloat16),
    ("caps", torch.bfloat16, torch.bfloat16),
    ("caps", torch.float32, torch.float32),
]


@pytest.mark.parametrize(("mix", "dtype", "teacher_dtype"), DTYPES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_worse_than_pytorch(divergence, mix, dtype, teacher_dtype, kernels, device, no_worse):
    mix, V = MIXES[mix], 5000
    x, teacher, target, scale = problem(4, V, dtype, device, teacher_dtype)
    exact = truth(x.double(), teacher.double(), target, divergence, scale.double(), **mix)
    plain_loss, plain_gradient = truth(x.float(), teacher.float(), target, divergence, scale, **mix)
    for loss, gradient, _ in every_way(kernels, x, teacher, target, scale, options_of(divergence, **mix)):
        no_worse("loss", loss, plain_loss, exact[0], terms=V, logits=10)
        via = dtype if INTERPRETER_TRUNCATES and dtype == torch.bfloat16 else None
        no_worse("gradient", gradient, plain_gradient.to(dtype), exact[1], terms=V, logits=10, via=via)


#: Its cast to bfloat16 truncates, which costs a unit in the last place.
INTERPRETER_TRUNCATES = os.environ.get("TRITON_INTERPRET") == "1"


MASKS = {
    "-inf on both sides": (-math.inf, -math.inf),
    "finfo.min on both sides": (torch.finfo(torch.float32).min, torch.finfo(torch.float32).min),
    "student's finfo.min": (torch.finfo(torch.float32).min, None),
    "teacher's finfo.min": (None, torch.finfo(torch.float32).min),
    "student's -inf": (-math.inf, None),
    "teacher's -inf": (None, -math.inf),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_classes(divergence, mask, kernels, device, no_worse):
    """Whole tiles of them, and every third beside. Losses may be infinite; a gradient of that is not compared."""
    V, mix = 8192, {"temperature": 2.0}
    x, teacher, target, scale = problem(3, V, torch.float32, device)
    for side, value in zip((x, teacher), MASKS[mask], strict=True):
        if value is not None:
            side[:, :4096], side[:, 4096::3] = value, value
            side[1] = 0.0
    exact = by_hand(x.double(), teacher.double(), target, divergence, scale.double(), **mix)
    plain = by_hand(x, teacher, target, divergence, scale, **mix)
    for loss, gradient, _ in every_way(kernels, x, teacher, target, scale, options_of(divergence, **mix)):
        no_worse("loss", loss, plain[0], exact[0], terms=V, logits=10)
        finite = exact[0].isfinite()
        no_worse("gradient", gradient[finite], plain[1][finite], exact[1][finite], terms=V, logits=10)


@pytest.mark.parametrize("size", [0.01, 100.0, 1e4, 1e12])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_any_size(divergence, size, kernels, device, no_worse):
    V, mix = 300, {"temperature": 2.0, "alpha": 0.5}
    x, teacher, target, scale = problem(4, V, torch.float32, device, size=size)
    x[3] = -size  # all classes are equal
    exact = by_hand(x.double(), teacher.double(), target, divergence, scale.double(), **mix)
    plain = by_hand(x, teacher, target, divergence, scale, **mix)
    for loss, gradient, _ in every_way(kernels, x, teacher, target, scale, options_of(divergence, **mix)):
        no_worse("loss", loss, plain[0], exact[0], terms=V, logits=min(size, 1e4), scale=1.0)
        no_worse("gradient", gradient, plain[1], exact[1], terms=V, logits=min(size, 1e4), scale=1.0)


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_not_hidden(divergence, side, kernels, device):
    x, teacher, target, scale = problem(4, 300, torch.float32, device)
    (x, teacher)[side][2, 7] = math.nan
    for loss, gradient, _ in every_way(kernels, x, teacher, target, scale, options_of(divergence, alpha=0.5)):
        assert loss.isnan().tolist() == [False, False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, False, True, False]
        assert gradient.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics(temperature, kernels, device):
    """They are the student's at temperature 1. Of equal logits, the first is predicted."""
    x, teacher, target, scale = problem(4, 5000, torch.float32, device)
    x[0, [4321, 17, 4322]] = 30.0
    x[2, ::7] = -math.inf
    teacher[2, ::7] = -math.inf
    options = options_of("reverse_kl", temperature=temperature)
    log_q = x.double().log_softmax(-1)
    kept = target != -100
    for *_, (lse, predicted, entropy) in every_way(kernels, x, teacher, target, scale, options, with_stats=True):
        expected = torch.where(kept, x.double().logsumexp(-1), 0.0)
        torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(predicted, torch.where(kept, x.argmax(-1), 0))
        true = -torch.where(log_q.exp() > 0, log_q.exp() * log_q, 0.0).sum(-1)
        torch.testing.assert_close(entropy.double(), torch.where(kept, true, 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_layouts(divergence, kernels, device):
    """Strided classes of the student, an expanded teacher, a gradient with gaps between its rows, an odd address."""
    x, teacher, target, scale = problem(5, 1000, torch.float64, device)
    x[1], teacher[:] = 1.0, teacher[:1]
    options, scale = options_of(divergence, alpha=0.5), scale.double()
    loss, gradient = truth(x, teacher, target, divergence, scale, alpha=0.5)
    strided = x.t().contiguous().t()
    odd = torch.empty(5 * 1003 + 1, dtype=x.dtype, device=device)[1:].view(5, 1003)[:, :1000].copy_(x)
    for each in (strided, odd):
        rows, saved = kernels.forward(each, Teacher(teacher[:1].expand(5, -1)), target, options, with_stats=False)
        dx = torch.empty(5, 1200, dtype=x.dtype, device=device)[:, :1000]
        kernels.backward(scale, each, Teacher(teacher), target, saved, options, dx=dx)
        torch.testing.assert_close(rows[0], loss)
        torch.testing.assert_close(dx, gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_class_and_no_row(divergence, kernels, device):
    x, teacher, target, scale = problem(3, 1, torch.float32, device)
    target[target != -100] = 0
    for loss, gradient, _ in every_way(kernels, x, teacher, target, scale, options_of(divergence, alpha=0.5)):
        torch.testing.assert_close(loss, torch.zeros(3, device=device), rtol=0.0, atol=0.0)
        assert not gradient.any()
    for N, V in ((0, 5), (0, 1)):
        empty = torch.empty(N, V, device=device)
        for loss, gradient, _ in every_way(
            kernels, empty, empty, target[:0], scale[:0], options_of(divergence), with_stats=True
        ):
            assert loss.shape == (0,)
            assert gradient.shape == (N, V)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="watches launches by Triton's interpreter")
def test_rows_that_are_few_are_split_in_backward(kernels, device):
    x, teacher, target, scale = problem(3, 20000, torch.float32, device)
    _, saved = kernels.forward(x, Teacher(teacher), target, options_of("jsd"), with_stats=False)
    with mock.patch.object(distillation.prepare.Prepared, "_run", autospec=True) as run:
        kernels.backward(scale, x, Teacher(teacher), target, saved, options_of("jsd"), dx=torch.empty_like(x))
    (prepared, _), _ = run.call_args
    assert prepared.grid[0] > 3


def test_a_call_takes_the_kernels(kernels, device, monkeypatch):
    """`backend="triton"` reaches them, and "auto" does for CUDA tensors only."""
    taken = []
    for name in ("forward", "backward"):
        original = getattr(distillation, name)
        monkeypatch.setattr(distillation, name, lambda *a, _f=original, **k: taken.append(_f) or _f(*a, **k))
    x, teacher, target, _ = problem(4, 30, torch.float32, device)
    for backend in ("triton", "torch", "auto"):
        fused_distillation_loss(x.requires_grad_(), teacher, target, backend=backend).backward()
        assert len(taken) == (4 if device != "cpu" and backend == "auto" else 2)
