"""The kernels' launchers against the float64 reference, under every kind of launch: none may change the result."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fused_ignore_ce.backends import reference
from fused_ignore_ce.kernels import cross_entropy, device_math
from fused_ignore_ce.kernels.launch import Launch

pytestmark = pytest.mark.usefixtures("triton_kernels")

V = 1000


class Options(NamedTuple):
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Upstream(NamedTuple):
    dloss: torch.Tensor
    dlse: torch.Tensor | None = None
    dentropy: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    token_weight: torch.Tensor | None = None


EVERYTHING = Options(label_smoothing=0.1, softcap=10.0, logit_scale=1.5)
OPTIONS = [Options(), Options(label_smoothing=0.1), Options(softcap=10.0), Options(logit_scale=-0.7), EVERYTHING]

# Tiles of (rows, chunks, lanes, width) of V = 1000 classes.
LAUNCHES = [
    pytest.param(Launch(1, 2, 16, 4, 4, splits=1, split_tiles=8), id="one-row-many-tiles"),
    pytest.param(Launch(1, 1, 256, 8, 4, splits=1, split_tiles=1), id="one-short-tile"),
    pytest.param(Launch(1, 16, 16, 1, 4, splits=1, split_tiles=4), id="unaligned"),
    pytest.param(Launch(4, 1, 16, 4, 4, splits=1, split_tiles=16), id="four-rows"),
    pytest.param(Launch(16, 1, 32, 1, 4, splits=1, split_tiles=32), id="sixteen-rows"),
    pytest.param(Launch(1, 2, 16, 4, 4, splits=4, split_tiles=2), id="four-splits"),
    pytest.param(Launch(2, 1, 16, 8, 4, splits=8, split_tiles=1), id="a-split-a-tile"),
]


def problem(device, dtype=torch.float64, probs=False, weight=True, size=4.0):
    """Logits (2, 3, V) with masked classes and a row of NaN that is ignored; targets in the first and the last tile."""
    x = (torch.randn(2, 3, V, device=device, dtype=torch.float64) * size).to(dtype)
    x[0, 0, :300] = -torch.inf
    x[1, 1] = float("nan")
    target = torch.tensor([400, 300, V - 1, 512, -100, 511], device=device)
    q = torch.rand(2, 3, V, device=device).to(dtype) if probs else None
    if probs:
        q[0, 0, :300] = 0.0
    w = torch.rand(V, device=device).to(dtype) if weight else None
    if w is not None:
        w[:300] = 0.0  # a masked class may have no smoothing
    return x, target, w, q


def expected(x, target, weight, probs, options, upstream, dtype=torch.float64):
    """(rows, dx, dprobs) by the reference, in `dtype`. -1e4 stands for -inf, for which autograd would give NaN."""
    x = x.to(dtype).nan_to_num(nan=float("nan"), neginf=-1e4).requires_grad_()
    q = None if probs is None else probs.to(dtype).requires_grad_()
    w = None if weight is None else weight.to(dtype)
    rows = reference.rows(x, target.view(x.shape[:2]), w, q, **options._asdict())
    g = upstream.dloss.to(dtype)
    for factor in (upstream.factor, upstream.token_weight):
        g = g if factor is None else g * factor.to(dtype)
    total = (rows.loss.flatten() * g).sum()
    for value, gradient in ((rows.lse, upstream.dlse), (rows.entropy, upstream.dentropy)):
        if gradient is not None:
            total = total + (value.flatten() * gradient.to(dtype)).sum()
    dx, *dprobs = torch.autograd.grad(total, [x] if q is None else [x, q])
    return rows, dx, dprobs[0] if dprobs else None


def gradients(x, target, weight, probs, options, upstream, rows, **how):
    """(dx, dprobs) by the kernels, over poisoned memory."""
    _, _, norm, _, entropy = rows
    dx = torch.empty_like(x)
    dprobs = None if probs is None else torch.empty_like(probs)
    saved = cross_entropy.Saved(norm, entropy)
    cross_entropy.backward(upstream, (x, target, weight, probs), saved, options, dx=dx, dprobs=dprobs, **how)
    return dx, dprobs


def upstreams(device, dtype=torch.float64, n=6, all_of_them=True):
    rows = [torch.randn(n, device=device, dtype=dtype) for _ in range(4)]
    if not all_of_them:
        return Upstream(rows[0])
    return Upstream(rows[0], rows[1], rows[2], torch.tensor(-1.5, device=device, dtype=dtype), rows[3])


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("options", [Options(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_launch_does_not_matter(launch, options, probs, device):
    tensors = problem(device, probs=probs, weight=options.label_smoothing > 0 or probs)
    x, target, *_ = tensors
    upstream = upstreams(device)
    rows = cross_entropy.forward(tensors, options, with_stats=True, launch=launch)
    wanted, dx, dprobs = expected(*tensors, options, upstream)
    loss, lse, _, predicted, entropy = rows
    torch.testing.assert_close(loss, wanted.loss.flatten())
    torch.testing.assert_close(lse, wanted.lse.flatten())
    torch.testing.assert_close(entropy, wanted.entropy.flatten())
    used = reference.used_logits(x, options.softcap, options.logit_scale)
    kept = target != -100
    assert torch.equal(predicted[kept], used.argmax(-1).flatten()[kept])
    ours, ours_probs = gradients(*tensors, options, upstream, rows, launch=launch)
    torch.testing.assert_close(ours, dx)
    assert (ours.view(6, V)[~kept] == 0).all()
    if probs:
        possible = tensors[3] != 0  # where the reference has a gradient
        torch.testing.assert_close(ours_probs[possible], dprobs[possible])
        assert (ours_probs.view(6, V)[~kept] == 0).all()


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_worse_than_pytorch(dtype, options, probs, device, no_worse):
    x, target, weight, q = problem(device, dtype, probs)
    x[0, 0, :300] = 0.0  # another test covers -inf
    x[1, 1] = 0.0
    if probs:
        q[0, 0, :300] = 0.5
    upstream = upstreams(device, torch.float32, all_of_them=False)
    rows = cross_entropy.forward((x, target, weight, q), options)
    wanted, dx, dprobs = expected(x, target, weight, q, options, upstream)
    ref, dx_ref, dprobs_ref = expected(x, target, weight, q, options, upstream, torch.float32)
    ours, ours_probs = gradients(x, target, weight, q, options, upstream, rows)
    no_worse("loss", rows[0], ref.loss.flatten(), wanted.loss.flatten(), terms=V)
    no_worse("lse", rows[1], ref.lse.flatten(), wanted.lse.flatten(), terms=V)
    size = upstream.dloss.abs().max() * abs(options.logit_scale)
    # Two units of float32; the interpreter truncates where it casts to bfloat16.
    no_worse("dx", ours, dx_ref.to(dtype), dx, scale=size, terms=V)
    if probs:
        no_worse("dprobs", ours_probs, dprobs_ref.to(dtype), dprobs, scale=upstream.dloss.abs().max(), terms=V)


def at_size(size, device):
    """(logits around `size`, targets that are likely, unlikely and at the largest logit)."""
    x = size + 3 * torch.randn(1, 4, 5000, device=device)
    return x, torch.cat([x[0, :2].argmax(1), torch.tensor([7, 4999], device=device)])


def errors(size, device):
    """(ours, PyTorch's, the reference's) loss and dx. Ours and PyTorch's are float32, the reference's float64."""
    x, target = at_size(size, device)
    upstream = Upstream(torch.full((4,), 1.5, device=device))
    rows = cross_entropy.forward((x, target, None, None), Options())
    dx, _ = gradients(x, target, None, None, Options(), upstream, rows)
    wanted, dx_wanted, _ = expected(x, target, None, None, Options(), upstream)
    leaf = x.clone().requires_grad_()
    loss = F.cross_entropy(leaf[0], target, reduction="none")
    (dx_ref,) = torch.autograd.grad(loss.sum() * 1.5, leaf)
    return (rows[0], loss, wanted.loss[0]), (dx, dx_ref, dx_wanted)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e5, -1e5])
def test_large_logits(size, device, no_worse):
    """At these sizes, rounding a product before the shift is subtracted would lose all digits."""
    loss, dx = errors(size, device)
    no_worse("loss", *loss, terms=V)
    no_worse("dx", *dx, scale=1.5, terms=V)


@pytest.mark.skipif(not cross_entropy.interpreted(), reason="breaks the arithmetic of Triton's interpreter")
def test_large_logits_need_the_fused_multiply_add(device, no_worse, monkeypatch):
    """The test above fails if the exponent is computed with two roundings."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def twice_rounded(self, x, y, z):
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    monkeypatch.setattr(device_math, "EMULATED", False)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", twice_rounded)  # as before Triton 3.9
    for size in (1e4, 1e5):
        loss, dx = errors(size, device)
        with pytest.raises(AssertionError, match="loss: off by"):
            no_worse("loss", *loss, terms=V)
        with pytest.raises(AssertionError, match="dx: off by"):
            no_worse("dx", *dx, scale=1.5, terms=V)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_certain_target_costs_nothing(size, device):
    """The loss and the target's gradient are exactly 0, without a rounding error."""
    x = torch.zeros(1, 4, V, device=device)
    target = torch.tensor([0, 7, 500, V - 1], device=device)
    x[0, range(4), target] = torch.tensor([60.0, 77.7, 90.1, 63.3], device=device)
    x += size
    rows = cross_entropy.forward((x, target, None, None), Options())
    assert rows[0].tolist() == [0.0] * 4
    dx, _ = gradients(x, target, None, None, Options(), Upstream(torch.ones(4, device=device)), rows)
    assert (dx[0, range(4), target] == 0).all()
    assert (dx.sum(-1).abs() < 1e-20).all()


@pytest.mark.parametrize("best", [0, 130, V - 1])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_first_of_the_largest(launch, best, device):
    x = torch.zeros(2, 3, V, device=device)
    x[..., best:] = 1.0
    target = torch.zeros(6, dtype=torch.int64, device=device)
    *_, predicted, _ = cross_entropy.forward((x, target, None, None), Options(), with_stats=True, launch=launch)
    assert predicted.tolist() == [best] * 6


@pytest.mark.parametrize("launch", LAUNCHES)
def test_rows_of_minus_infinity_and_worse(launch, device):
    """A row of -inf has loss NaN, gradient 0 and predicts class 0. +inf and NaN give NaN. Other rows are unaffected."""
    x = torch.randn(2, 3, V, device=device)
    x[0, 0] = -torch.inf
    x[0, 1, 5] = torch.inf
    x[0, 2, 900] = float("nan")
    target = torch.tensor([3, 3, 3, 3, -100, 3], device=device)
    rows = cross_entropy.forward((x, target, None, None), Options(), with_stats=True, launch=launch)
    loss, lse, _, predicted, _ = rows
    assert loss.isnan().tolist() == [True, True, True, False, False, False]
    assert lse[0] == -torch.inf
    assert predicted[0] == 0
    upstream = Upstream(torch.ones(6, device=device))
    dx, _ = gradients(x, target, None, None, Options(), upstream, rows, launch=launch)
    assert (dx[0, 0] == 0).all()
    assert dx[0, 1].isnan().any()
    assert dx[0, 2].isnan().any()
    wanted, dx_wanted, _ = expected(x[1:], target[3:], None, None, Options(), Upstream(upstream.dloss[3:]))
    torch.testing.assert_close(loss[3:], wanted.loss.flatten().float())
    torch.testing.assert_close(dx[1:], dx_wanted.float())


@pytest.mark.parametrize("upstream", [float("nan"), float("inf")])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_ignored_rows_are_selected_not_multiplied(launch, upstream, device):
    x, target, *_ = problem(device, torch.float32)
    options = Options(softcap=10.0)  # the capped logit of a row that is not read is finite
    target[:] = -100
    x[:] = float("nan")
    rows = cross_entropy.forward((x, target, None, None), options, with_stats=True, launch=launch)
    assert all((each == 0).all() for each in rows)
    g = torch.full((6,), upstream, device=device)
    dx, _ = gradients(x, target, None, None, options, Upstream(g, g, g, g[0], g), rows, launch=launch)
    assert (dx == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes_have_no_gradient(smoothing, device):
    x, target, *_ = problem(device, torch.float32)
    x[..., :300] = -torch.inf
    target[target != -100] = 700
    target[0] = 7  # a masked class: its loss is infinite, but its gradient is 0 like that of others
    weight = torch.ones(V, device=device)
    weight[:300] = 0 if smoothing else 1
    weight[7] = 1
    options = Options(label_smoothing=smoothing)
    rows = cross_entropy.forward((x, target, weight, None), options)
    dx, _ = gradients(x, target, weight, None, options, Upstream(torch.ones(6, device=device)), rows)
    assert rows[0].isfinite().tolist() == [False] + [not smoothing or target[i] == -100 for i in range(1, 6)]
    assert (dx[..., :300] == 0).all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("together", [False, True], ids=["merged", "combined"])
def test_parts_of_the_vocabulary(together, probs, device):
    """Blocks have unequal sizes, and one has a single class. Gradients are computed block by block."""
    x, target, weight, q = tensors = problem(device, probs=probs)
    upstream = upstreams(device)
    starts = [0, 300, 700, V - 1, V]
    blocks = [slice(a, b) for a, b in pairwise(starts)]
    parts = cross_entropy.new_parts(x, len(blocks), True)
    for part, block in enumerate(blocks):
        cross_entropy.forward_part(
            (x[..., block], target, weight[block], q[..., block] if probs else None), EVERYTHING, parts=parts,
            part=part, block=(block.start, V), with_stats=True,
        )  # fmt: skip
    parts = cross_entropy.combine(parts, EVERYTHING) if together else parts
    rows = cross_entropy.merge(target, parts, EVERYTHING, with_stats=True)
    whole = cross_entropy.forward(tensors, EVERYTHING, with_stats=True)
    for ours, other in zip(rows, whole, strict=True):
        torch.testing.assert_close(ours, other)
    _, dx, _ = expected(*tensors, EVERYTHING, upstream)
    for block in blocks:
        ours, _ = gradients(
            x[..., block], target, weight[block], q[..., block] if probs else None, EVERYTHING, upstream, rows,
            block=(block.start, V),
        )  # fmt: skip
        torch.testing.assert_close(ours, dx[..., block])


def test_the_shift_of_a_part_follows_from_its_largest_logit(device):
    """The exponents are next to whole numbers, where rounding may take the kernel's own shift to either side."""
    cap = 10.0
    whole = torch.arange(-14, 15, dtype=torch.float64) / (cap * device_math.LOG2E.value)
    ulps = torch.arange(-40, 41) * 2.0**-23
    x = (cap * torch.atanh(whole)[:, None] * (1 + ulps)).float().view(1, -1, 1).to(device)
    target = torch.zeros(x.shape[1], dtype=torch.int64, device=device)
    parts = cross_entropy.new_parts(x, 1, False)
    options = Options(softcap=cap)
    cross_entropy.forward_part((x, target, None, None), options, parts=parts, part=0, block=(0, 1))
    loss, lse, *_ = cross_entropy.merge(target, parts, options)
    torch.testing.assert_close(lse, reference.used_logits(x.flatten().double(), cap).float())
    assert (loss.abs() < 1e-6).all()


def test_upstream_of_any_stride(device):
    """A scalar, an expanded scalar, every other element."""
    x, target, *_ = problem(device, weight=False)
    rows = cross_entropy.forward((x, target, None, None), Options(), with_stats=True)
    scalar = torch.tensor(0.7, device=device, dtype=torch.float64)
    sparse = torch.randn(12, device=device, dtype=torch.float64)[::2]
    for dloss in (scalar, scalar.expand(6), sparse):
        upstream = Upstream(dloss, sparse, scalar.expand(6), scalar, sparse)
        dense = Upstream(dloss.expand(6), *upstream[1:])
        dx, _ = gradients(x, target, None, None, Options(), upstream, rows)
        torch.testing.assert_close(dx, expected(x, target, None, None, Options(), dense)[1])


@pytest.mark.parametrize("layout", ["strided", "row-strided", "unaligned", "expanded"])
def test_layouts(layout, device):
    """Classes that are not neighbours, rows with gaps, rows that start anywhere, one row for all."""
    x, target, *_ = problem(device, weight=False)
    x = x.nan_to_num(0.0, neginf=-9.0)
    if layout == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "row-strided":
        x = F.pad(x, (0, 24))[..., :V]
    elif layout == "unaligned":
        x = F.pad(x, (3, 2))[..., 3 : V + 3]
    else:
        x = x[:1, :1].expand(2, 3, V)
    upstream = upstreams(device)
    rows = cross_entropy.forward((x, target, None, None), Options(), with_stats=True)
    wanted, dx_wanted, _ = expected(x, target, None, None, Options(), upstream)
    torch.testing.assert_close(rows[0], wanted.loss.flatten())
    dx = torch.empty(x.shape, device=device, dtype=x.dtype)
    cross_entropy.backward(
        upstream, (x, target, None, None), cross_entropy.Saved(rows[2], rows[4]), Options(), dx=dx, dprobs=None
    )
    torch.testing.assert_close(dx, dx_wanted)


def test_in_place(device):
    x, target, *_ = problem(device, weight=False)
    upstream = upstreams(device)
    rows = cross_entropy.forward((x, target, None, None), Options(), with_stats=True)
    _, dx, _ = expected(x, target, None, None, Options(), upstream)
    cross_entropy.backward(
        upstream, (x, target, None, None), cross_entropy.Saved(rows[2], rows[4]), Options(), dx=x, dprobs=None
    )
    torch.testing.assert_close(x, dx)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (1, 1, 1)])
def test_hardly_anything(shape, device):
    x = torch.randn(shape, device=device)
    target = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=device)
    rows = cross_entropy.forward((x, target, None, None), Options(), with_stats=True)
    assert (rows[0] == 0).all()  # with one class, the loss is 0
    dx, _ = gradients(x, target, None, None, Options(), Upstream(torch.ones(len(target), device=device)), rows)
    assert (dx == 0).all()


def test_memory_is_poisoned(device):
    """What the other tests rely on: memory that nobody wrote reads as NaN."""
    assert torch.empty(5, device=device).isnan().all()
    assert torch.ones(2, device=device).new_empty(5).isnan().all()
    assert torch.empty_like(torch.ones(5, device=device)).isnan().all()
