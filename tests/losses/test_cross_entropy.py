"""PyTorch's semantics: every shape, dtype, target kind, weight, smoothing and reduction of F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import FusedCrossEntropyLoss, fused_cross_entropy

SHAPES = [
    pytest.param((7,), id="C7"),  # no batch
    pytest.param((1, 1), id="N1-C1"),
    pytest.param((13, 50), id="N13-C50"),  # C below a block, not a power of two; several rows a tile
    pytest.param((4, 4096), id="N4-C4096"),  # exactly one block
    pytest.param((3, 5003), id="N3-C5003"),  # several blocks, unaligned rows; few rows: split over programs
    pytest.param((33, 1100), id="N33-C1100"),  # one block, mostly full
    pytest.param((2, 11, 5), id="N2-C11-d5"),  # one spatial dimension, classes strided
    pytest.param((2, 40, 3, 7), id="N2-C40-d3x7"),  # an image; classes over one strided block
    pytest.param((2, 5, 2, 3, 2), id="N2-C5-d2x3x2"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make(shape, dtype, device, probs=False, ignore_index=-100):
    C = shape[0] if len(shape) == 1 else shape[1]
    x = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    if probs:
        target = torch.rand(shape, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(0, C, shape[:1] + shape[2:] if len(shape) > 1 else ())
        flat = target.view(-1)
        if flat.numel() > 2:  # first class, last class, an ignored row
            flat[0], flat[1], flat[2] = 0, C - 1, ignore_index
    return x.to(device), target.to(device)


def run(function, x, target, weight, **options):
    """(loss, dx, dtarget) under an upstream gradient that is not 1; the backward runs twice."""
    x = x.detach().clone().requires_grad_()
    inputs = [x]
    if target.is_floating_point():
        target = target.detach().clone().requires_grad_()
        inputs.append(target)
    loss = function(x, target, weight, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss) + 2
    gradients = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, upstream)
    for first, second in zip(gradients, again, strict=True):
        assert torch.equal(first, second) or first.isnan().any()
    return loss, *gradients


def compare(no_worse, x, target, weight, backend, **options):
    def wide(t):
        return t.double() if t is not None and t.is_floating_point() else t

    ours = run(lambda *a, **k: fused_cross_entropy(*a, **k, backend=backend), x, target, weight, **options)
    ref = run(F.cross_entropy, x, target, weight, **options)
    true = run(F.cross_entropy, wide(x), wide(target), wide(weight), **options)
    for name, *three in zip(("loss", "dx", "dtarget"), ours, ref, true, strict=False):
        no_worse(name, *three, terms=max(x.shape))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, probs, reduction, backend, device, no_worse):
    x, target = make(shape, torch.float32, device, probs)
    compare(no_worse, x, target, None, backend, reduction=reduction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_weights_smoothing(dtype, probs, weighted, smoothing, backend, device, no_worse):
    x, target = make((5, 300), dtype, device, probs)  # unaligned rows; the last program has fewer rows than the first
    weight = (torch.rand(300, dtype=torch.float64) + 0.1).to(dtype).to(device) if weighted else None
    for reduction in ("mean", "sum", "none"):
        compare(no_worse, x, target, weight, backend, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("probs_dtype", DTYPES, ids=str)
def test_probabilities_promote(probs_dtype, backend, device, no_worse):
    x, _ = make((6, 40), torch.bfloat16, device)
    compare(no_worse, x, torch.rand(6, 40, device=device).to(probs_dtype), None, backend)


def test_weight_of_zero(backend, device, no_worse):
    x, target = make((6, 40), torch.float32, device)
    weight = torch.ones(40, device=device)
    weight[target[0]] = 0.0
    compare(no_worse, x, target, weight, backend)


def test_uint8_target(backend, device, no_worse):
    x, target = make((6, 40), torch.float32, device, ignore_index=255)
    compare(no_worse, x, target.to(torch.uint8), None, backend, ignore_index=255)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (3, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty(shape, reduction, backend, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    target = torch.full((shape[0], *shape[2:]), -100, device=device)
    loss = fused_cross_entropy(x, target, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    loss.sum().backward()
    assert x.grad.shape == x.shape
    assert (x.grad == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5])
def test_large_logits(scale, backend, device, no_worse):
    """A common offset must cost no accuracy: lse is kept as max + log-sum, not rounded at the size of max."""
    x, target = make((6, 3000), torch.float32, device)
    compare(no_worse, x + scale, target, None, backend, label_smoothing=0.1)
    compare(no_worse, x * scale / 10, target, None, backend)


def test_module_equals_functional(backend, device):
    x, target = make((6, 40), torch.float32, device)
    weight = torch.rand(40, device=device)
    target[2] = target[0]
    options = {"ignore_index": int(target[0]), "reduction": "sum", "label_smoothing": 0.2}
    ours = FusedCrossEntropyLoss(weight, backend=backend, **options)
    torch.testing.assert_close(ours(x, target), F.cross_entropy(x, target, weight, **options))
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert "label_smoothing=0.2" in repr(ours)
    assert list(ours.state_dict()) == ["weight"]


def test_runs_are_bitwise_equal(backend, device):
    x, target = make((5, 9000), torch.bfloat16, device)
    first = run(lambda *a, **k: fused_cross_entropy(*a, **k, backend=backend), x, target, None)
    second = run(lambda *a, **k: fused_cross_entropy(*a, **k, backend=backend), x, target, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_subclasses_of_tensor_are_tensors():
    """PyTorch converts the results of a subclass's function to the subclass, which fails for a tuple of statistics."""

    class Named(torch.Tensor):
        pass

    x, y = torch.randn(4, 7), torch.tensor([1, -100, 3, 6])
    loss, stats = fused_cross_entropy(x.as_subclass(Named), y, return_stats=True)
    torch.testing.assert_close(torch.Tensor(loss), F.cross_entropy(x, y))
    assert stats.num_tokens == 3
