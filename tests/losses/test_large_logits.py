"""All finite logits are right, up to the largest finite numbers, which masks are made of."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy
from fused_ignore_ce.backends import choice
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Block, Logits

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

#: Logits of the first classes, and the target. `m` is the lowest finite number, `-m` the largest.
ROWS = {
    "far below 0": lambda m: ([-1e10, -1e10], 0),
    "masked alone": lambda m: ([m, m], 1),
    "far above 0": lambda m: ([1e12, 0.0], 0),
    "masked target": lambda m: ([0.0, m], 1),
    "masked others": lambda m: ([0.0, m, m, m], 0),
    "both ends": lambda m: ([-m, m], 0),
    "largest": lambda m: ([-m, -m, 3.0], 1),
    "around the limit of one shift": lambda m: ([1.4e9, 1.5e9, 1.4e9], 1),
    "below the limit of one shift": lambda m: ([-1.48e9, -1.5e9, -1.48e9, -1.49e9], 2),
    "ties among large ones": lambda m: ([3e15, 3e15, 3e15 - 1e14], 0),
    "past the limit in float64": lambda m: ([4e18, 4e18, 3.2e18, -3e20], 1),
}
FILLERS = {"0": 0.0, "-inf": -torch.inf, "lowest": None}
OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 1e12}, {"softcap": 30.0, "label_smoothing": 0.1}]


def example(dtype, V, filler, device):
    """All rows, and a row of NaN that is ignored."""
    m = torch.finfo(dtype).min
    x = torch.full((len(ROWS) + 1, V), m if filler is None else filler, dtype=dtype, device=device)
    target = torch.full((len(x),), -100, device=device)
    for n, row in enumerate(ROWS.values()):
        values, y = row(m)
        at = [min(i * (V // 4 + 1), V - 1) if V > 9 else i for i in range(len(values))]  # spread over tiles and parts
        x[n, at] = torch.tensor(values, dtype=torch.float64).to(dtype).to(device)
        target[n] = at[y]
    x[-1] = torch.nan
    return x, target


def truth(x, target, upstream, softcap=None, **options):
    """PyTorch's losses and gradients in float64."""
    leaf = x.double().requires_grad_()
    used = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    loss = F.cross_entropy(used, target, reduction="none", **options)
    (dx,) = torch.autograd.grad(loss, leaf, upstream.double())
    return loss.detach(), dx.masked_fill_((x == -torch.inf) | (target == -100).unsqueeze(1), 0.0)


def judge(found, true, dtype, capped):
    loss, dx = found
    true_loss, true_dx = true
    if dtype == torch.float64:  # PyTorch's own sums overflow there
        fine = true_loss.isfinite()
        loss, true_loss, dx, true_dx = loss[fine], true_loss[fine], dx[fine], true_dx[fine]
    rtol, atol = max(2 * torch.finfo(dtype).eps, 1e-5), 3e-5 if capped else 2e-6  # a capped logit is off by an ulp
    torch.testing.assert_close(loss, true_loss.to(dtype), rtol=rtol, atol=atol)
    torch.testing.assert_close(dx, true_dx.to(dtype), rtol=rtol, atol=atol)


SHAPES = [(7, "0"), (7, "lowest"), (7, "-inf"), (300, "lowest"), (4600, "0"), (20000, "lowest")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("V", "filler"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(dtype, V, filler, options, backend, device):
    x, target = example(dtype, V, FILLERS[filler], device)
    upstream = torch.linspace(1, 2, len(x), device=device).to(dtype)
    leaf = x.clone().requires_grad_()
    loss = fused_cross_entropy(leaf, target, reduction="none", backend=backend, **options)
    (dx,) = torch.autograd.grad(loss, leaf, upstream)
    judge((loss.detach(), dx), truth(x, target, upstream, **options), dtype, bool(options.get("softcap")))


@pytest.mark.parametrize(
    ("strided", "dtype"), [(False, torch.float32), (False, torch.float64), (True, torch.bfloat16)], ids=str
)
def test_gradient_in_forward(strided, dtype, backend, device):
    """One walk or two, of rows that are or are not contiguous; with a z-loss that would overflow but for its weight."""
    x, target = example(dtype, 4600, None, device)
    x = x.t().contiguous().t() if strided else x
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    found = [
        fused_cross_entropy(leaf, target, reduction="sum", loss_dtype=torch.float64, backend=backend, **how)
        for leaf, how in zip(leaves, ({}, {"grad_in_forward": True}), strict=True)
    ]
    for loss in found:
        (loss * 2).backward()
    torch.testing.assert_close(*found)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    _, dx = truth(x, target, torch.full((len(x),), 2.0, device=device))
    if dtype != torch.float64:
        torch.testing.assert_close(
            leaves[1].grad.double(), dx, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_are_merged_and_combined(dtype, options, backend, device):
    """Blocks of the vocabulary, as the linear loss and sharded vocabularies have them."""
    x, target = example(dtype, 300, None, device)
    kernels = choice.implementation(backend, x.device)
    options = LossOptions(**options)
    whole = kernels.forward(Logits(x[None], target, None, None), options, with_stats=True)
    slices = [slice(0, 100), slice(100, 110), slice(110, 300)]
    parts = kernels.new_parts(x[None], len(slices), True)
    for i, block in enumerate(slices):
        logits = Logits(x[None, :, block], target, None, None)
        kernels.forward_part(logits, options, parts=parts, part=i, block=Block(block.start, 300), with_stats=True)
    kept = target != -100
    for merged in (parts, kernels.combine(parts, options)):
        rows = kernels.merge(target, merged, options, with_stats=True)
        for ours, expected in zip(rows, whole, strict=True):
            torch.testing.assert_close(ours[..., kept], expected[..., kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_statistics_and_their_gradients(dtype, options, backend, device):
    x, target = example(dtype, 300, None, device)
    leaf, wide = x.clone().requires_grad_(), x[:-1].double().requires_grad_()
    _, stats = fused_cross_entropy(leaf, target, return_stats="differentiable", backend=backend, **options)
    softcap = options.get("softcap")
    used = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    log_p = used.log_softmax(1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(1)
    # Tanh of 16-bit logits is right to 7e-7 of the cap, with instructions as bad as the PTX manual lets them be.
    atol = 7e-7 * softcap if softcap and dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(stats.lse[:-1].double(), used.logsumexp(1), rtol=1e-5, atol=atol)
    torch.testing.assert_close(stats.entropy[:-1].double(), entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.predicted[:-1], used.argmax(1))
    (dx,) = torch.autograd.grad((stats.lse[:-1].sum() + 2 * stats.entropy[:-1].sum()), leaf)
    # The gradient of lse is p. PyTorch's is exp(x - lse), whose difference is rounded at the size of lse.
    (true,) = torch.autograd.grad((p.detach() * used).sum() + 2 * entropy.sum(), wide)
    torch.testing.assert_close(dx[:-1].double(), true, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert (dx[-1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_probabilities(dtype, backend, device):
    """Their gradient is the negative log-probability, which is finite where logits are."""
    x, _ = example(dtype, 20, None, device)
    x = x[:-1]
    q = torch.rand(x.shape, device=device).softmax(1)
    q[:, 3] = 0
    ours = [x.clone().requires_grad_(), q.clone().requires_grad_()]
    loss = fused_cross_entropy(*ours, reduction="none", label_smoothing=0.1, backend=backend, loss_dtype=torch.float32)
    gradients = torch.autograd.grad(loss.sum(), ours)
    wide = [x.double().requires_grad_(), q.double().requires_grad_()]
    expected = F.cross_entropy(*wide, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    for name, ours, true in zip("xq", gradients, torch.autograd.grad(expected.sum(), wide), strict=True):
        rtol = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, true.to(ours.dtype), rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hidden_states(smoothing, backend, plan, device):
    """A bias makes the logits, so that the linear loss has them block by block."""
    m = torch.finfo(torch.float32).min
    for values, y in (([-1e10] * 40, 0), ([m] * 40, 39), ([1e12] + [0.0] * 38 + [m], 0), ([0.0] * 20 + [m] * 20, 30)):
        b = torch.tensor(values, device=device, requires_grad=True)
        h, w = torch.zeros(3, 2, device=device), torch.zeros(40, 2, device=device)
        target = torch.full((3,), y, device=device)
        loss = fused_linear_cross_entropy(
            h, w, target, linear_bias=b, label_smoothing=smoothing, reduction="none", backend=backend
        )
        (db,) = torch.autograd.grad(loss.sum(), b)
        wide = b.detach().double().requires_grad_()
        expected = F.cross_entropy(wide.expand(3, 40), target, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(loss, expected.float())
        torch.testing.assert_close(db.double(), torch.autograd.grad(expected.sum(), wide)[0], rtol=1e-5, atol=1e-6)
