"""The registered operators: opcheck, no graph break, fake tensors, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ignore_ce import FusedCrossEntropyLoss, fused_causal_lm_loss, fused_cross_entropy

OPS = torch.ops.fused_ignore_ce


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # otherwise the tests share one limit of recompilations


def forward_args(device, backend, probs=False, weighted=False, with_stats=False, requires_grad=True):
    x = torch.randn(2, 3, 7, device=device, requires_grad=requires_grad)
    target = torch.tensor([1, 6, -100, 0, 2, 3], device=device)
    q = torch.rand(2, 3, 7, device=device, requires_grad=requires_grad) if probs else None
    weight = torch.rand(7, device=device) if weighted else None
    return (
        x,
        target.clamp(min=0) if probs else target,
        weight,
        q,
        2,
        -100,
        0.1,
        5.0,
        1.0,
        0.01,
        with_stats,
        backend,
        None,
    )


@pytest.mark.parametrize("with_stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_opcheck_forward(probs, weighted, with_stats, backend, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares what fake kernels leave unwritten
    torch.library.opcheck(OPS.cross_entropy_forward, forward_args(device, backend, probs, weighted, with_stats))


@pytest.mark.parametrize(("need_dx", "need_dprobs"), [(True, False), (False, True), (True, True)])
def test_opcheck_backward(need_dx, need_dprobs, backend, device):
    torch.use_deterministic_algorithms(False)
    arguments = forward_args(device, backend, probs=True, with_stats=True, requires_grad=False)
    logits = arguments[:5]
    loss, lse, entropy, _, norm, _, _, block = OPS.cross_entropy_forward(*arguments)
    upstream = [torch.rand_like(t) for t in (loss, lse, entropy)]
    saved = (norm, entropy, block)
    torch.library.opcheck(
        OPS.cross_entropy_backward, (*upstream, *logits, *saved, need_dx, need_dprobs, *arguments[5:])
    )


CALLS = {
    "index": lambda x, y, **k: fused_cross_entropy(x, y, **k),
    "several ids": lambda x, y, **k: fused_cross_entropy(x, y, ignore_index=[-100, 3], **k),
    "probs": lambda x, y, **k: fused_cross_entropy(x, x.detach().softmax(1), label_smoothing=0.1, **k),
    "options": lambda x, y, **k: fused_cross_entropy(
        x, y, softcap=5.0, z_loss=0.1, token_weight=torch.arange(4.0, device=x.device), **k
    ),
    "none": lambda x, y, **k: fused_cross_entropy(x, y, reduction="none", **k).square().sum(),
    "normalizer": lambda x, y, **k: fused_cross_entropy(x, y, normalizer=torch.tensor(3.0, device=x.device), **k),
    "stats": lambda x, y, **k: (
        sum(t.sum() for t in fused_cross_entropy(x, y, return_stats=True, **k)[1]) + fused_cross_entropy(x, y, **k)
    ),
    "module": lambda x, y, **k: FusedCrossEntropyLoss(label_smoothing=0.1, **k)(x, y),
    "causal": lambda x, y, **k: fused_causal_lm_loss(
        x[None], y[None], vocab_size=9, num_items_in_batch=3, output_attentions=True, **k
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_fullgraph(call, backend, device):
    def step(x, y):
        return call(x * 2, y, backend=backend)

    x, y = torch.randn(4, 9, device=device), torch.tensor([1, -100, 3, 8], device=device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, y)
        results.append((loss, *torch.autograd.grad(loss, leaf, torch.tensor(1.5, device=device))))
    torch.testing.assert_close(*results)


def test_inductor_with_dynamic_shapes(backend, device):
    """One compilation serves every number of rows and of ignored rows."""
    graphs, first = [], 0

    def counting(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def step(h, w, y):
        return fused_cross_entropy(h @ w, y, backend=backend)

    w = torch.randn(4, 30, device=device)
    for N in (5, 8, 13):
        h, y = torch.randn(N, 4, device=device, requires_grad=True), torch.randint(0, 30, (N,), device=device)
        y[: N // 2] = -100
        loss = step(h, w, y)
        expected = F.cross_entropy(h @ w, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*[torch.autograd.grad(value, h)[0] for value in (loss, expected)])
        first = first or len(graphs)  # the compiler may restart within the first call
    assert len(graphs) == first


def test_fake_tensors_run_no_kernel(backend, device):
    with FakeTensorMode():
        x = torch.empty(10**6, 10**6, device=device, dtype=torch.bfloat16, requires_grad=True)
        loss = fused_cross_entropy(x, torch.zeros(10**6, dtype=torch.long, device=device), backend=backend)
        loss.backward()
        assert (loss.shape, loss.dtype) == ((), torch.bfloat16)
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_autocast(probs, dtype, backend, device):
    x = torch.randn(4, 9, device=device).to(dtype).requires_grad_()
    target = torch.rand(4, 9, device=device) if probs else torch.tensor([1, -100, 3, 8], device=device)
    weight = torch.rand(9, device=device).to(dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fused_cross_entropy(x, target, weight, backend=backend)
        expected = F.cross_entropy(x, target, weight)
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected)
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.dtype == dtype
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x)[0])


def test_activation_checkpointing(backend, device):
    from torch.utils.checkpoint import checkpoint

    h = torch.randn(4, 9, device=device, requires_grad=True)
    y = torch.tensor([1, -100, 3, 8], device=device)

    def block(h):
        return fused_cross_entropy(h * 3, y, backend=backend)

    gradients = [torch.autograd.grad(loss, h)[0] for loss in (block(h), checkpoint(block, h, use_reentrant=False))]
    torch.testing.assert_close(*gradients)


def test_calls_in_between_compile_nothing_again(backend, device):
    """Eager calls fill caches, which must not make a compiled function compile again."""
    torch._dynamo.reset()
    x, target = torch.randn(4, 30, device=device, requires_grad=True), torch.randint(0, 30, (4,), device=device)
    compiled = torch.compile(lambda x: fused_cross_entropy(x, target, backend=backend), backend="aot_eager")
    first = compiled(x)
    fused_cross_entropy(x[:3], target[:3], backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x), first)
