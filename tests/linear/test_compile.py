"""The linear loss's operators: opcheck, no graph break, no host sync while tracing, fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ignore_ce import FusedLinearCrossEntropyLoss, fused_linear_cross_entropy, fused_linear_log_probs

OPS = torch.ops.fused_ignore_ce
OPTIONS = (-100, 0.1, 5.0, 1.0, 0.01)


def scalars(with_stats, backend):
    return (*OPTIONS, with_stats, backend, None, torch.float32, None, None, True)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # otherwise the tests share one limit of recompilations


def operands(device, probs, full, requires_grad=True):
    h = torch.randn(5, 4, device=device, requires_grad=requires_grad)
    w = torch.randn(9, 4, device=device, requires_grad=requires_grad)
    b = torch.randn(9, device=device, requires_grad=requires_grad) if full else None
    target = torch.tensor([1, 8, -100, 0, 2], device=device)
    q = torch.rand(5, 9, device=device, requires_grad=requires_grad) if probs else None
    weight = torch.rand(9, device=device) if full else None
    return h, w, b, target.clamp(min=0) if probs else target, weight, q


@pytest.mark.parametrize("full", [False, True], ids=["", "bias, weight, stats"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_opcheck_forward(probs, full, backend, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares what fake kernels leave unwritten
    arguments = (*operands(device, probs, full), *scalars(full, backend))
    torch.library.opcheck(OPS.linear_cross_entropy_forward, arguments)


@pytest.mark.parametrize("full", [False, True], ids=["", "bias, weight, stats"])
def test_opcheck_sum(full, backend, device):
    torch.use_deterministic_algorithms(False)
    scale = torch.rand(5, device=device, requires_grad=True)
    scale_z = torch.rand(5, device=device, requires_grad=True) if full else None
    arguments = (*operands(device, False, full), scale, scale_z, True, True, full, *scalars(full, backend))
    torch.library.opcheck(OPS.linear_cross_entropy_sum, arguments)


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_opcheck_backward(probs, backend, device):
    torch.use_deterministic_algorithms(False)
    given = operands(device, probs, True, requires_grad=False)
    loss, lse, entropy, _, norm, _, _, block = OPS.linear_cross_entropy_forward(*given, *scalars(True, backend))
    upstream = [torch.rand_like(t) for t in (loss, lse, entropy)]
    saved = (norm, entropy, block)
    arguments = (*upstream, *given, *saved, True, True, True, probs, *scalars(True, backend))
    torch.library.opcheck(OPS.linear_cross_entropy_backward, arguments)


CALLS = {
    "mean": lambda h, w, y, **k: fused_linear_cross_entropy(h, w, y, **k),
    "several ids": lambda h, w, y, **k: fused_linear_cross_entropy(h, w, y, ignore_index=[-100, 3], **k),
    "probs": lambda h, w, y, **k: fused_linear_cross_entropy(h, w, F.linear(h, w).detach().softmax(1), **k),
    "options": lambda h, w, y, **k: fused_linear_cross_entropy(
        h, w, y, softcap=5.0, z_loss=0.1, token_weight=torch.arange(4.0, device=h.device), **k
    ),
    "none": lambda h, w, y, **k: fused_linear_cross_entropy(h, w, y, reduction="none", **k).square().sum(),
    "budget": lambda h, w, y, **k: fused_linear_cross_entropy(h, w, y, memory_budget=10**5, **k),
    "normalizer": lambda h, w, y, **k: fused_linear_cross_entropy(
        h, w, y, normalizer=torch.tensor(3.0, device=h.device), **k
    ),
    "stats": lambda h, w, y, **k: (
        sum(t.sum() for t in fused_linear_cross_entropy(h, w, y, return_stats=True, **k)[1])
        + fused_linear_cross_entropy(h, w, y, **k)
    ),
    "log_probs": lambda h, w, y, **k: fused_linear_log_probs(h, w, y, **k).sum(),
    "positions": lambda h, w, y, **k: fused_linear_cross_entropy(
        h, torch.stack((w, 2 * w), 1), torch.stack((y, y.flip(0)), 1), **k
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_fullgraph(call, backend, device):
    """A row is ignored. With ignored rows, the compiled loss of another package is wrong."""

    def step(h, w, y):
        return call(h * 2, w, y, backend=backend)

    h, w = torch.randn(4, 6, device=device), torch.randn(9, 6, device=device)
    y = torch.tensor([1, -100, 3, 8], device=device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(*leaves, y)
        results.append((loss, *torch.autograd.grad(loss, leaves, torch.tensor(1.5, device=device))))
    torch.testing.assert_close(*results)


def test_inductor(backend, device):
    """A whole training step of a module, whose second half of rows is ignored and holds NaN."""
    module = FusedLinearCrossEntropyLoss(6, 50, bias=True, backend=backend, device=device)
    h = torch.randn(8, 6, device=device)
    y = torch.tensor([1, 2, 3, 49, *[-100] * 4], device=device)
    results = []
    for function in (module, torch.compile(module, fullgraph=True)):
        module.zero_grad()
        hidden = torch.where(y.unsqueeze(1) == -100, torch.nan, h).requires_grad_()
        loss = function(hidden, y)
        (loss * 3).backward()
        results.append((loss.detach(), hidden.grad, module.linear.weight.grad, module.linear.bias.grad))
    torch.testing.assert_close(*results)
    assert (results[1][1][4:] == 0).all()


def test_dynamic_rows(device):
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda h, w, y: fused_linear_cross_entropy(h, w, y), fullgraph=True, backend=counting, dynamic=True
    )
    w = torch.randn(9, 6, device=device)
    for N in (4, 7, 12):
        h, y = torch.randn(N, 6, device=device), torch.randint(0, 9, (N,), device=device)
        torch.testing.assert_close(step(h, w, y), F.cross_entropy(F.linear(h, w), y))
    assert len(graphs) == 1


def test_tracing_waits_for_nothing(device):
    """Fake tensors have no values that could be waited for."""
    with FakeTensorMode():
        h, w = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        loss = fused_linear_cross_entropy(h, w, torch.zeros(6, dtype=torch.int64))
        dh, dw = torch.autograd.grad(loss, (h, w))
    assert loss.shape == ()
    assert (dh.shape, dw.shape) == (h.shape, w.shape)
