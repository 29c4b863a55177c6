"""The distillation losses where logits are masked, equal or huge, or nothing is kept; and all that is refused."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    fused_distillation_loss,
    fused_linear_distillation_loss,
    fused_top_k_distillation_loss,
)
from fused_ignore_ce.backends import reference

from ..helpers.distillation import DIVERGENCES, TARGET, E, K, N, V, gradients, logits_of, tensors


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


def test_second_derivatives_are_refused():
    h, w, _b, *teacher = tensors()
    for loss in (
        fused_linear_distillation_loss(h, w, *teacher[:2]),
        fused_distillation_loss(F.linear(h, w), F.linear(*teacher[:2])),
    ):
        with pytest.raises(RuntimeError, match="create_graph: expected False, as distillation"):
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


def test_other_classes_that_are_far_below_the_one_of_the_teacher(backend):
    """Their shares of the rest come from their logits; log-probabilities are too far from 0 to tell them apart."""
    h, ids, log_p = torch.tensor([[5e9, 1.0, 0.0]], requires_grad=True), torch.tensor([[0]]), torch.tensor([[-0.5]])
    (dh,) = torch.autograd.grad(fused_top_k_distillation_loss(h, torch.eye(3), ids, log_p, backend=backend), h)
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
