"""`grad_in_forward`: the gradient comes with the loss, and is exact for whatever upstream gradient comes later."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import FusedCrossEntropyLoss, fused_causal_lm_loss, fused_cross_entropy
from fused_ignore_ce.backends import choice as backends
from fused_ignore_ce.backends import reference

N, V = 5, 70
OPTIONS = {"label_smoothing": 0.1, "softcap": 5.0}


@pytest.fixture
def passes(backend, device, monkeypatch):
    """The names of the backend's functions in the order of calls, without the calls that they make to each other."""
    kernels = backends.implementation(backend, torch.device(device))
    called, inside = [], []
    for name in ("forward", "forward_reduce", "backward", "forward_backward", "forward_backward_reduce", "scale"):
        if not hasattr(kernels, name):
            continue
        original = getattr(kernels, name)

        def counted(*args, name=name, original=original, **kwargs):
            if not inside:
                called.append(name)
            inside.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(kernels, name, counted)
    return called


def problem(device, dtype=torch.float64):
    x = torch.randn(N, V, dtype=torch.float64, device=device).to(dtype)
    x[1] = float("nan")  # an ignored row
    return x.requires_grad_(), torch.tensor([3, -100, 69, 0, 12], device=device)


def in_forward(backend, z_loss=0.0):
    """The name of the function that computes loss and gradient. Triton's also reduces, unless there is a z-loss."""
    return "forward_backward_reduce" if backend == "triton" and not z_loss else "forward_backward"


@pytest.mark.parametrize("upstream", [1.0, 0.0, -1.5, 1e30])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("inplace_backward", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_for_every_upstream_gradient(reduction, inplace_backward, z_loss, upstream, backend, passes, device):
    x, y = problem(device)
    options = OPTIONS | {"z_loss": z_loss}
    expected = reference.cross_entropy(x, y, reduction=reduction, **options)
    g = torch.tensor(upstream, dtype=x.dtype, device=device)
    (true,) = torch.autograd.grad(expected, x, g)
    given = x.detach().clone().requires_grad_()
    logits = given * 1.0  # not a leaf, so it may be overwritten
    loss = fused_cross_entropy(
        logits, y, reduction=reduction, grad_in_forward=True, inplace_backward=inplace_backward, backend=backend,
        **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    assert passes == [in_forward(backend, z_loss)]
    (dlogits,) = torch.autograd.grad(loss, logits, g)
    torch.testing.assert_close(dlogits, true.nan_to_num(0.0))
    assert (dlogits[1] == 0).all()
    assert passes == [in_forward(backend, z_loss), "scale"]
    assert (dlogits.data_ptr() == logits.data_ptr()) == inplace_backward


@pytest.mark.parametrize("shape", [(N, V), (V,), (2, V, 3), (2, V, 3, 2)], ids=str)
@pytest.mark.parametrize("normalizer", [None, 3.5, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_weights_and_shapes(dtype, normalizer, shape, backend, device):
    """Loss and gradient equal those without the option, up to rounding."""
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    y = torch.randint(0, V, (*shape[:1], *shape[2:]) if len(shape) > 1 else (), device=device)
    weight = torch.rand(V, device=device).to(dtype)
    token_weight = torch.rand(y.shape, device=device)
    normalizer = torch.tensor(3.5, device=device) if normalizer == "tensor" else normalizer
    results = []
    for given in (True, False):
        loss = fused_cross_entropy(
            x, y, weight, token_weight=token_weight, normalizer=normalizer, loss_dtype=torch.float64,
            grad_in_forward=given, backend=backend,
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, x, torch.tensor(-1.5, dtype=torch.float64, device=device))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=4e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["", "inplace"])
def test_backward_again_and_again(inplace_backward, backend, device):
    x, y = problem(device)
    loss = fused_cross_entropy(x * 1.0, y, grad_in_forward=True, inplace_backward=inplace_backward, backend=backend)
    (true,) = torch.autograd.grad(F.cross_entropy(x, y), x)
    for upstream, keep in ((2.0, True), (1.0, True), (-0.5, True), (3.0, False)):
        (dx,) = torch.autograd.grad(loss, x, torch.tensor(upstream).to(loss), retain_graph=keep)
        torch.testing.assert_close(dx, upstream * true.nan_to_num(0.0))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["", "inplace"])
def test_float16_with_a_loss_scale(inplace_backward, backend, device):
    """Gradients as small as 1 / N are not rounded to 0 before the scale enlarges them."""
    scale, count = 65536.0, 1e9
    x = (torch.randn(N, V, device=device) * 3).half()
    y = torch.tensor([3, -100, 69, 0, 12], device=device)
    leaf = x.double().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(leaf, y, reduction="sum") / count * scale, leaf)
    given = x.clone().requires_grad_()
    loss = fused_cross_entropy(
        given * 1.0, y, normalizer=count, grad_in_forward=True, inplace_backward=inplace_backward,
        loss_dtype=torch.float32, backend=backend,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(loss * scale, given)
    # Rounded once in forward and once in backward, to half a unit or, in the interpreter, a whole one.
    allowed = 4 * torch.finfo(torch.float16).eps * true.abs() + 2.0**-23
    assert true.abs().max() < 1e-4
    assert ((dx.double() - true).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_kept(rows, dtype, backend, device):
    x = torch.randn(rows, V, device=device).to(dtype).requires_grad_()
    y = torch.full((rows,), -100, device=device)
    loss = fused_cross_entropy(x, y, grad_in_forward=True, backend=backend)
    assert loss.isnan()
    (dx,) = torch.autograd.grad(loss, x)
    assert (dx == 0).all()


def test_inplace_is_noticed_by_whoever_needs_the_logits(backend, device, monkeypatch):
    """Kernels write without PyTorch's knowledge, as here through `.data`. Autograd still reports the change."""
    kernels = backends.implementation(backend, torch.device(device))
    original = kernels.forward_backward
    monkeypatch.setattr(kernels, "forward_backward", lambda *args, dx, **how: original(*args, dx=dx.data, **how))
    x, y = problem(device)
    logits = x * 1.0
    squares = logits.square()  # saves the logits
    version = logits._version
    loss = fused_cross_entropy(logits, y, grad_in_forward=True, inplace_backward=True, backend=backend)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(squares[0].sum() + loss, x)
    kept = x.detach().clone()
    fused_cross_entropy(x, y, grad_in_forward=True, backend=backend).backward()
    assert torch.equal(x.nan_to_num(7.0), kept.nan_to_num(7.0))  # and nothing is written without it


def cannot(device):
    """Options with which the gradient cannot be computed in forward."""
    trained = torch.ones(N, dtype=torch.float64, device=device, requires_grad=True)
    count = torch.tensor(4.0, dtype=torch.float64, device=device, requires_grad=True)
    return {
        "rows": {"reduction": "none"},
        "token weights with a gradient": {"token_weight": trained},
        "a normalizer with a gradient": {"normalizer": count},
        "statistics with gradients": {"return_stats": "differentiable"},
    }


@pytest.mark.parametrize("case", cannot("cpu"))
def test_where_it_cannot_be_it_has_no_effect(case, backend, passes, device):
    options = cannot(device)[case]
    x, y = problem(device)
    results = []
    for grad_in_forward in (True, False):
        found = fused_cross_entropy(x, y, grad_in_forward=grad_in_forward, backend=backend, **options)
        loss = found[0] if isinstance(found, tuple) else found
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
    assert not {"forward_backward", "forward_backward_reduce"} & set(passes)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_no_gradient_is_computed_that_nobody_wants(backend, passes, device):
    x, y = problem(device)
    with torch.no_grad():
        fused_cross_entropy(x, y, grad_in_forward=True, backend=backend)
    fused_cross_entropy(x.detach(), y, grad_in_forward=True, backend=backend)
    assert passes == ["forward_reduce" if backend == "triton" else "forward"] * 2


def test_with_probabilities_and_statistics(backend, passes, device):
    x = torch.randn(N, V, dtype=torch.float64, device=device, requires_grad=True)
    q = torch.rand(N, V, dtype=torch.float64, device=device)
    loss, stats = fused_cross_entropy(x, q, grad_in_forward=True, return_stats=True, backend=backend)
    assert passes[0] == in_forward(backend)
    (dx,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(dx, torch.autograd.grad(F.cross_entropy(x, q), x)[0])
    assert torch.equal(stats.predicted, x.argmax(1))
    q.requires_grad_()
    fused_cross_entropy(x, q, grad_in_forward=True, backend=backend).backward()
    torch.testing.assert_close(q.grad, torch.autograd.grad(F.cross_entropy(x, q), q)[0])


def test_a_second_derivative_is_refused(backend, device):
    x, y = problem(device)
    loss = fused_cross_entropy(x, y, grad_in_forward=True, backend=backend)
    with pytest.raises(NotImplementedError, match="create_graph: expected False.*pass grad_in_forward=False"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_faces_hand_it_on(backend, passes, device):
    x, y = problem(device)
    FusedCrossEntropyLoss(grad_in_forward=True, backend=backend)(x, y)
    fused_causal_lm_loss(x[None], y[None], grad_in_forward=True, backend=backend)
    assert passes == [in_forward(backend)] * 2


def test_compiled_it_has_no_effect(device):
    torch._dynamo.reset()
    x, y = problem(device)
    compiled = torch.compile(
        lambda x: fused_cross_entropy(x, y, grad_in_forward=True), backend="aot_eager", fullgraph=True
    )
    (ours,) = torch.autograd.grad(compiled(x), x, torch.tensor(2.0).to(x))
    torch.testing.assert_close(ours, 2 * torch.autograd.grad(F.cross_entropy(x, y), x)[0].nan_to_num(0.0))
