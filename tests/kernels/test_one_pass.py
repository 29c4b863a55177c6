"""Loss and gradient in one launch, the scaling of such a gradient, and the reduction to a scalar."""

import itertools
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fused_ignore_ce.backends import reference
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Upstream
from fused_ignore_ce.kernels import cross_entropy, prepare
from fused_ignore_ce.kernels.launch import Launch

CASES = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 10.0, "logit_scale": 0.7},
    {"label_smoothing": 0.1, "softcap": 10.0, "logit_scale": -1.5},
]
V = 1000

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="watches launches by Triton's interpreter"
)


def options(**given):
    return LossOptions(**given)


def upstream(dloss, factor=None, token_weight=None):
    return Upstream(dloss, factor=factor, token_weight=token_weight)


def problem(device, dtype=torch.float64):
    x = (torch.randn(2, 3, V, device=device, dtype=torch.float64) * 4).to(dtype)
    x[0, 0, :300] = -1e4
    x[1, 1] = float("nan")
    return x, torch.tensor([400, 0, V - 1, 512, -100, 511], device=device)


@pytest.mark.parametrize("programs", [1, 4, 6])
@pytest.mark.parametrize("tile", [(1, 2, 16, 4), (1, 1, 256, 8), (1, 16, 16, 1)], ids=str)
@pytest.mark.parametrize("given", CASES, ids=str)
def test_one_pass(given, tile, programs, device):
    """The gradient overwrites the logits, so that a logit that is read too late gives a wrong result."""
    x, target = problem(device)
    weight = torch.rand(V, device=device, dtype=x.dtype)
    g, dz, token_weight = (torch.randn(6, device=device, dtype=x.dtype) for _ in range(3))
    factor = torch.tensor(-1.5, device=device, dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    wanted = reference.rows(leaf, target.view(2, 3), weight, **given)
    total = (g * factor * token_weight * wanted.loss.flatten()).sum() + 0.05 * (dz * wanted.lse.flatten() ** 2).sum()
    (dx,) = torch.autograd.grad(total, leaf)
    loss, lse, norm, predicted, entropy = cross_entropy.forward_backward(
        upstream(g, factor, token_weight), (x, target, weight, None), options(**given, z_loss=0.05), dx=x, dz=dz,
        with_stats=True, launch=Launch(*tile, 4, programs=programs),
    )  # fmt: skip
    torch.testing.assert_close(loss, wanted.loss.flatten())
    torch.testing.assert_close(lse, wanted.lse.flatten())
    torch.testing.assert_close(entropy, wanted.entropy.flatten())
    torch.testing.assert_close(x, dx)
    assert (x.view(6, V)[4] == 0).all()
    rows = cross_entropy.forward((leaf.detach(), target, weight, None), options(**given), with_stats=True)
    for one, other in zip((norm, predicted), rows[2:4], strict=True):
        torch.testing.assert_close(one, other)


def test_one_pass_is_forward_and_backward_bit_for_bit(device):
    """With the same tiles, rows and gradient have the same bits in float32."""
    x, target = problem(device, torch.float32)
    g = torch.randn(6, device=device)
    launch = Launch(1, 2, 16, 4, 4, splits=1, split_tiles=8, programs=2)
    rows = cross_entropy.forward((x, target, None, None), options(), launch=launch)
    two = torch.empty_like(x)
    cross_entropy.backward(
        upstream(g), (x, target, None, None), cross_entropy.Saved(rows[2], None), options(), dx=two, dprobs=None,
        launch=launch,
    )  # fmt: skip
    one = torch.empty_like(x)
    rows_too = cross_entropy.forward_backward(upstream(g), (x, target, None, None), options(), dx=one, launch=launch)
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(rows[:4], rows_too[:4], strict=True))


@pytest.mark.parametrize("layout", ["strided logits", "strided gradient", "probabilities"])
def test_two_passes_where_one_cannot_be(layout, device):
    """Strided classes and probability targets take one launch for each direction, and give right results."""
    x, target = problem(device)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    probs = torch.rand_like(x) if layout == "probabilities" else None
    g, dz = (torch.randn(6, device=device, dtype=x.dtype) for _ in range(2))
    leaf = x.clone().requires_grad_()
    wanted = reference.rows(leaf, target.view(2, 3), None, probs)
    total = (g * wanted.loss.flatten()).sum() + 0.05 * (dz * wanted.lse.flatten() ** 2).sum()
    (expected,) = torch.autograd.grad(total, leaf)
    given, dx = strided if layout == "strided logits" else x, strided if layout == "strided gradient" else x
    assert not cross_entropy.can_one_pass(given, probs) or dx is strided
    loss, *_ = cross_entropy.forward_backward(
        upstream(g), (given, target, None, probs), options(z_loss=0.05), dx=dx, dz=dz
    )
    torch.testing.assert_close(loss, wanted.loss.flatten())
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("shape", [(2, 3, 700), (1, 600, 20), (1, 1, 9000)])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_scale(factor, shape, device):
    x = torch.randn(shape, device=device)
    dloss = torch.tensor(-3.0, device=device)
    wanted = x * -3.0 * (factor or 1.0)
    factor = None if factor is None else torch.tensor(factor, device=device)
    out = torch.empty_like(x)
    before = x.clone()
    cross_entropy.scale(x, factor, dloss, out=out)
    assert torch.equal(out, wanted)
    assert torch.equal(x, before)
    cross_entropy.scale(x, None, torch.ones((), device=device), out=out)
    assert torch.equal(out, x)
    cross_entropy.scale(x, factor, dloss)
    assert torch.equal(x, wanted)


def test_scaled_ignored_rows_stay_zero(device):
    x = torch.randn(2, 3, 700, device=device)
    x[1] = 0
    cross_entropy.scale(x, None, torch.tensor(float("inf"), device=device))
    assert (x[1] == 0).all()
    assert x[0].isinf().all()


def rows_to_reduce(device, N, dtype):
    target = torch.randint(0, 50, (N,), device=device)
    target[::3] = -100
    loss = torch.randn(N, device=device, dtype=dtype).where(target != -100, 0.0)
    weights = torch.rand(50, device=device, dtype=dtype), torch.randn(2 * N, device=device, dtype=dtype)[::2]
    return loss, target, *weights


@pytest.mark.parametrize("N", [1, 7, 1000])
@pytest.mark.parametrize("programs", ["one", "several"])
@pytest.mark.parametrize(
    ("mean", "weighted", "token_weighted", "normalizer"),
    [
        *itertools.product([True, False], [True, False], [True, False], [None]),
        (True, True, True, 2.7),
        (True, False, True, "tensor"),
    ],
)
def test_reduce(mean, weighted, token_weighted, normalizer, programs, N, device):
    loss, target, weight, token_weight = rows_to_reduce(device, N, torch.float64)
    weight, token_weight = weight if weighted else None, token_weight if token_weighted else None
    normalizer = torch.tensor(3, device=device) if normalizer == "tensor" else normalizer
    keep = target != -100
    token = keep.double() if token_weight is None else token_weight.where(keep, 0.0)
    share = token if weight is None else token * weight[target.clamp(min=0)]
    divisor = share.sum() if mean else torch.ones(())
    if normalizer is not None:
        divisor = torch.as_tensor(normalizer, dtype=torch.float64)
    elif mean:
        divisor = divisor.where(divisor != 0, torch.nan)
    wanted = (token * loss).sum() / divisor
    rows = 4 if programs == "several" else 65536
    prepare.reduce.cache_clear()
    with mock.patch.multiple(prepare, REDUCE_ROWS=rows, REDUCE_BLOCK=128):
        total, factor, num_tokens = cross_entropy.reduce(
            (loss,), (target, weight, token_weight, normalizer), options(), mean=mean, with_stats=True
        )
    prepare.reduce.cache_clear()
    assert total.shape == num_tokens.shape == factor.shape == ()
    assert num_tokens == keep.sum()
    torch.testing.assert_close(total, wanted, equal_nan=True)
    torch.testing.assert_close(factor, (1 / divisor).double(), equal_nan=True)


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize(("splits", "at_most"), [(1, 1024), (4, 1024), (4, 2)], ids=["whole", "merged", "three"])
def test_forward_and_reduce(splits, at_most, mean, probs, device):
    """Rows and total equal those of two separate calls. The reduction also merges parts, unless rows are too many."""
    x, target = problem(device)
    q = torch.rand_like(x) if probs else None
    weight, token_weight = torch.rand(V, device=device, dtype=x.dtype), torch.rand(6, device=device, dtype=x.dtype)
    launch = Launch(1, 2, 16, 4, 4, splits=splits, split_tiles=8 // splits)
    rows = cross_entropy.forward((x, target, weight, q), options(), with_stats=True, launch=launch)
    class_weight = None if probs else weight
    total = cross_entropy.reduce(
        rows, (target, class_weight, token_weight, None), options(), mean=mean, with_stats=True
    )
    with mock.patch.object(cross_entropy, "MERGE_AND_REDUCE_ROWS", at_most):
        both = cross_entropy.forward_reduce(
            (x, target, weight, q), token_weight, None, options(), mean=mean, with_stats=True, launch=launch
        )
    for ours, other in zip((*both[0], *both[1]), (*rows, *total), strict=True):
        assert torch.equal(ours, other)


@interpreted
@pytest.mark.parametrize("N", [4, 600])
def test_forward_and_reduce_are_two_launches(N):
    """4 rows are so few that they are split; 600 are not."""
    x, target = torch.randn(1, N, 9001), torch.zeros(N, dtype=torch.int64)
    with mock.patch.object(prepare.Prepared, "_run", autospec=True) as run:
        cross_entropy.forward_reduce((x, target, None, None), None, None, options(), mean=True)
    kernels = [call.args[0].kernel.fn.__name__ for call in run.call_args_list]
    assert kernels == ["forward_kernel", "reduce_kernel"]


def test_reduce_to_another_dtype(device):
    loss, target, *_ = rows_to_reduce(device, 100, torch.float32)
    whole = cross_entropy.reduce((loss,), (target, None, None, None), options(), mean=True)
    half = cross_entropy.reduce((loss,), (target, None, None, None), options(), mean=True, out_dtype=torch.float16)
    assert half[0].dtype == torch.float16
    torch.testing.assert_close(half[0], whole[0].half())


def test_reduce_of_nothing(device):
    """All rows ignored: NaN for "mean", 0 for a sum or with a normalizer."""
    loss = torch.zeros(5, device=device)
    target = torch.full((5,), -100, device=device)

    def total(**how):
        return cross_entropy.reduce((loss,), (target, None, None, how.pop("normalizer", None)), options(), **how)[0]

    assert total(mean=True).isnan()
    assert total(mean=False) == 0
    assert total(mean=True, normalizer=5) == 0
    assert total(mean=True, normalizer=torch.tensor(5, device=device)) == 0


def test_reduce_is_the_same_every_time(device):
    loss, target, *_ = rows_to_reduce(device, 5000, torch.float32)
    totals = [cross_entropy.reduce((loss,), (target, None, None, None), options(), mean=True) for _ in range(3)]
    assert len({float(total) for total, _, _ in totals}) == 1
