"""Exact gradients for every upstream gradient, any number of times, of any order, and for frozen inputs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ignore_ce import fused_cross_entropy

OPTIONS = [
    {},
    {"label_smoothing": 0.2},
    {"softcap": 3.0, "logit_scale": 0.7},
    {"z_loss": 0.05},
    {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.05, "logit_scale": -1.3},
]


def problem(device, probs):
    x = torch.randn(4, 5, device=device, dtype=torch.float64, requires_grad=True)
    if probs:
        return x, torch.rand(4, 5, device=device, dtype=torch.float64, requires_grad=True)
    return x, torch.tensor([4, -100, 0, 2], device=device)


def projected(backend):
    """Whether to check a random projection of the Jacobian instead of every element. Triton's interpreter is slow."""
    return backend == "triton"


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options, probs, weighted, backend, device):
    x, target = problem(device, probs)
    weight = torch.rand(5, device=device, dtype=torch.float64) + 0.5 if weighted else None
    for reduction in ("mean", "none"):

        def loss(x, target, reduction=reduction):
            return fused_cross_entropy(x, target, weight, reduction=reduction, backend=backend, **options)

        assert torch.autograd.gradcheck(loss, (x, target), fast_mode=projected(backend))


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradgradcheck(options, probs, backend, device):
    def loss(x, target):
        return fused_cross_entropy(x, target, backend=backend, **options)

    assert torch.autograd.gradgradcheck(loss, problem(device, probs), fast_mode=projected(backend))


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3)], ids=["rows", "classes second"])
def test_create_graph_of_an_operator(shape):
    """Under a dispatch mode, losses are operators, which have second derivatives as well."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = torch.randint(7, (shape[0], *shape[2:]))
    found = []
    for loss, mode in ((F.cross_entropy, contextlib.nullcontext()), (fused_cross_entropy, Mode())):
        with mode:
            (first,) = torch.autograd.grad(loss(x, y, label_smoothing=0.1), x, create_graph=True)
            found.append((first.detach(), *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(found[1], found[0])


def test_create_graph_is_not_detached(backend, device):
    """The upstream gradient needs no gradient itself. There, autograd's once_differentiable detaches silently."""
    x, y = problem(device, False)
    hidden = x * 1.5
    fused_cross_entropy(hidden, y, backend=backend).backward(create_graph=True)
    assert x.grad.requires_grad
    (penalty,) = torch.autograd.grad(x.grad.square().sum(), x)
    reference = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(F.cross_entropy(reference * 1.5, y), reference, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), reference)
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice(reduction, backend, device):
    """Upstream 2, then 5, under retain_graph: gradients 2 and 5 times the same, nothing accumulated or rescaled."""
    x = torch.randn(6, 300, device=device, requires_grad=True)
    y = torch.tensor([1, -100, 3, 299, 0, 2], device=device)
    loss = fused_cross_entropy(x, y, reduction=reduction, backend=backend)
    (two,) = torch.autograd.grad(loss, x, torch.full_like(loss, 2.0), retain_graph=True)
    (five,) = torch.autograd.grad(loss, x, torch.full_like(loss, 5.0), retain_graph=True)
    reference = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(reference, y, reduction=reduction).sum(), reference)
    torch.testing.assert_close(two, 2 * expected)
    torch.testing.assert_close(five, 5 * expected)


def test_fp16_with_a_loss_scale(backend, device):
    """1/N must not be folded into a stored float16 gradient: with N = 4096 it would flush to 0."""
    N, V, scale = 4096, 8, 65536.0
    x, y = torch.randn(N, V, device=device).half(), torch.randint(0, V, (N,), device=device)
    gradients = []
    for function, dtype in ((fused_cross_entropy, torch.float16), (F.cross_entropy, torch.float32)):
        leaf = x.detach().to(dtype).requires_grad_()
        loss = function(leaf, y, reduction="sum", **({"backend": backend} if dtype == torch.float16 else {}))
        ((loss.float() / N) * scale).backward()
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert (gradients[0] != 0).all()


def test_tiny_upstream_survives_fp16(backend, device):
    """p - 1 and the upstream factor meet in float32 and are rounded once."""
    x = torch.zeros(1, 2, device=device, dtype=torch.float16, requires_grad=True)
    loss = fused_cross_entropy(x, torch.tensor([0], device=device), backend=backend)
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(2.0**-20, device=device, dtype=torch.float16))
    assert dx.tolist() == [[-(2.0**-21), 2.0**-21]]


def test_gradients_are_rounded_once(backend, device):
    """If they were rounded before the upstream factor and after it, many elements would be off by one unit.

    The test uses float16, because Triton's interpreter truncates to bfloat16.
    """
    dtype = torch.float16
    x, y = torch.randn(8, 300, device=device).to(dtype).requires_grad_(), torch.arange(8, device=device)
    wide = x.detach().double().requires_grad_()
    factor = torch.tensor(0.7, device=device, dtype=dtype)
    (dx,) = torch.autograd.grad(fused_cross_entropy(x, y, reduction="sum", backend=backend), x, factor)
    (true,) = torch.autograd.grad(F.cross_entropy(wide, y, reduction="sum"), wide, factor.double())
    assert (dx == true.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("train_x", [False, True])
@pytest.mark.parametrize("train_probs", [False, True])
def test_frozen_inputs_get_none(train_x, train_probs, backend, device):
    x = torch.randn(3, 9, device=device, requires_grad=train_x)
    q = torch.rand(3, 9, device=device, requires_grad=train_probs)
    loss = fused_cross_entropy(x, q, backend=backend)
    assert loss.requires_grad == (train_x or train_probs)
    if loss.requires_grad:
        loss.backward()
    assert (x.grad is not None, q.grad is not None) == (train_x, train_probs)


def test_no_grad_saves_nothing(backend, device):
    x, y = problem(device, False)
    with torch.no_grad():
        assert fused_cross_entropy(x, y, backend=backend).grad_fn is None


def forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, x))


def test_other_transforms_are_refused_not_detached(backend, device):
    x, y = problem(device, False)
    x = x.detach()

    def loss(x):
        return fused_cross_entropy(x, y, backend=backend)

    transforms = [
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.vmap(loss)(x[None]),
        lambda: torch.func.jvp(loss, (x,), (x,)),
        lambda: forward_mode(loss, x),
    ]
    for transform in transforms:
        with pytest.raises(NotImplementedError, match="not supported by fused_ignore_ce"):
            transform()


class TestInplaceBackward:
    def test_gradient_takes_the_memory(self, backend, device):
        leaf = torch.randn(3, 50, device=device, requires_grad=True)
        y = torch.tensor([1, -100, 3], device=device)
        logits = leaf * 2
        fused_cross_entropy(logits, y, inplace_backward=True, backend=backend).backward()
        expected = leaf.detach().requires_grad_()
        F.cross_entropy(expected * 2, y).backward()
        torch.testing.assert_close(leaf.grad, expected.grad)
        torch.testing.assert_close(logits.detach() * 2, expected.grad)
        assert logits._version > 0

    def test_off_by_default(self, backend, device):
        leaf = torch.randn(3, 50, device=device, requires_grad=True)
        logits = leaf * 2
        before = logits.detach().clone()
        fused_cross_entropy(logits, torch.tensor([1, -100, 3], device=device), backend=backend).backward()
        assert torch.equal(logits, before)
        assert logits._version == 0

    def test_a_second_backward_is_an_error(self, backend, device):
        logits = torch.randn(3, 50, device=device, requires_grad=True) * 2
        loss = fused_cross_entropy(logits, torch.tensor([1, 2, 3], device=device), inplace_backward=True,
                                   backend=backend)  # fmt: skip
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_somebody_else_needs_the_logits(self, backend, device):
        logits = torch.randn(3, 50, device=device, requires_grad=True) * 2
        other = logits.square().sum()  # saved the logits
        loss = fused_cross_entropy(logits, torch.tensor([1, 2, 3], device=device), inplace_backward=True,
                                   backend=backend)  # fmt: skip
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_shared_memory_is_an_error(self, backend, device):
        logits = torch.randn(1, 50, device=device, requires_grad=True).expand(3, 50)
        with pytest.raises(ValueError, match=r"inplace_backward.*contiguous"):
            fused_cross_entropy(logits, torch.tensor([1, 2, 3], device=device), inplace_backward=True, backend=backend)
