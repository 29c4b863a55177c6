"""Every public function, on tensors of any layout, dtype and magnitude, is PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_ignore_ce import (
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
    fused_linear_log_probs,
)

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def negated(values):
    return torch._neg_view(-values)


def conjugated(values):
    """The imaginary part of a lazy conjugate, whose elements are two apart and lazily negated."""
    wide = values if values.dtype in (torch.float32, torch.float64) else None
    return negated(values) if wide is None else torch.complex(torch.zeros_like(wide), -wide).conj().imag


def expanded(values):
    """All rows are the first one."""
    return values[:1].expand_as(values) if len(values) else values


def cropped(values):
    """Between other elements, with rows and classes apart from each other."""
    outer = values.new_full((len(values) + 3, 2 * values.shape[1] + 4), torch.nan)
    view = outer[1:-2, 1:-3:2]
    return view.copy_(values)


LAYOUTS = [torch.clone, negated, conjugated, expanded, cropped, lambda t: t.t().contiguous().t()]


def head_of(x):
    """A head with which hidden states are their logits, exactly."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


def module(x, y, **options):
    backend, reduction = options.pop("backend"), options.pop("reduction")
    return FusedCrossEntropyLoss(backend=backend, reduction=reduction, **options)(x, y)


def linear_module(x, y, **options):
    criterion = FusedLinearCrossEntropyLoss(x.shape[1], x.shape[1], external_weight=True, **options)
    return criterion(x, y, linear_weight=head_of(x))


FUNCTIONS = {
    "logits": fused_cross_entropy,
    "gradient in forward": lambda x, y, **k: fused_cross_entropy(x, y, grad_in_forward=True, **k),
    "module": module,
    "causal": lambda x, y, **k: fused_causal_lm_loss(x, None, shift_labels=y, **k),
    "linear": lambda x, y, **k: fused_linear_cross_entropy(x, head_of(x), y, **k),
    "linear module": linear_module,
    "linear causal": lambda x, y, **k: fused_linear_causal_lm_loss(x, head_of(x), None, shift_labels=y, **k),
    "log-probabilities": lambda x, y, **k: (
        -fused_linear_log_probs(x, head_of(x), y, **{name: k[name] for name in ("softcap", "backend")})
    ),
}
UPSTREAM = [1.0, -2.5, 0.0, torch.inf, -torch.inf, torch.nan]


@st.composite
def calls(draw, function):
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    N, V = draw(st.sampled_from([0, 1, 3, 5])), draw(st.sampled_from([1, 2, 7, 40, 300]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    finite = torch.finfo(dtype)
    magnitude = min(10.0 ** draw(st.sampled_from([-3, 0, 1, 2, 4, 6, 8, 9, 10, 12, 20, 38, 300])), finite.max)
    x = (torch.randn(N, V, generator=rng, dtype=torch.float64) * magnitude).clamp(finite.min, finite.max)
    if draw(st.booleans()):
        x = x * 10.0 ** -torch.randint(0, 9, (N, 1), generator=rng)  # rows of several magnitudes
    if draw(st.booleans()):
        x[:, :: draw(st.sampled_from([1, 2, 3]))] += magnitude  # large, and close to each other
    masks = draw(st.sampled_from([[], [finite.min], [-torch.inf], [finite.min, finite.max]]))
    for value in masks:
        x[torch.rand(N, V, generator=rng) < 0.3] = value
    x = draw(st.sampled_from(LAYOUTS))(x.to(dtype).nan_to_num(nan=0.0, posinf=finite.max, neginf=-torch.inf))
    y = torch.randint(0, V, (N,), generator=rng).masked_fill(torch.rand(N, generator=rng) < 0.3, -100)
    reduction = "none" if function == "log-probabilities" else draw(st.sampled_from(["mean", "sum", "none"]))
    smoothing = 0.0 if function == "log-probabilities" else draw(st.sampled_from([0.0, 0.1]))
    softcap = draw(st.sampled_from([None, None, 30.0]))
    options = {"reduction": reduction, "label_smoothing": smoothing, "softcap": softcap}
    return x, y, options, draw(st.sampled_from(UPSTREAM)), draw(st.booleans())


def truth(x, y, upstream, softcap, **options):
    wide = x.resolve_neg().double().requires_grad_()
    loss = F.cross_entropy(wide if softcap is None else softcap * torch.tanh(wide / softcap), y, **options)
    finite_upstream = upstream if abs(upstream) < torch.inf else 1.0
    (dx,) = torch.autograd.grad(loss, wide, torch.full_like(loss, finite_upstream))
    return loss.detach(), dx


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_pytorch_in_float64(function, backend, device):
    @SETTINGS
    @given(calls(function))
    def check(call):
        x, y, options, upstream, lazy_upstream = call
        if function.startswith("linear") or function == "log-probabilities":  # 0 * inf is NaN in a matrix product
            x = x.resolve_neg().clamp(min=torch.finfo(x.dtype).min)
        x, y = x.to(device), y.to(device)
        true, true_dx = truth(x, y, upstream, **options)
        leaf = x.detach().requires_grad_()
        loss = FUNCTIONS[function](leaf, y, backend=backend, **options)
        above = torch.full_like(loss, upstream)
        (dx,) = torch.autograd.grad(loss, leaf, negated(above) if lazy_upstream else above)

        ignored = y == -100
        assert (dx[ignored] == 0).all()
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows, _ = truth(x, y, 0.0, **{**options, "reduction": "none"})
        if rows.abs().sum() >= torch.finfo(acc).max / 2 or rows.isnan().any():
            return  # PyTorch's sums overflow in this dtype, or in float64
        eps, capped = torch.finfo(x.dtype).eps, options["softcap"] is not None
        rtol, atol = 2 * max(eps, 1e-6 if acc == torch.float32 else 1e-12), 1e-4 if capped else 1e-5
        torch.testing.assert_close(loss.double(), true.to(loss.dtype).double(), rtol=rtol, atol=atol, equal_nan=True)
        forbidden = x.resolve_neg() == -torch.inf
        true_dx = true_dx.masked_fill(ignored.unsqueeze(1) | forbidden, 0.0)
        if abs(upstream) < torch.inf:
            atol = max(atol, 2 * eps) * max(abs(upstream), 1.0)
            torch.testing.assert_close(dx.double(), true_dx, rtol=rtol + 1e-5, atol=atol)
        else:
            assert not dx[true_dx.abs() > 1e-3].isfinite().any()

    check()


@SETTINGS
@given(call=calls("logits"), seed=st.integers(0, 2**20))
def check_probabilities(call, seed, backend, device):
    x, _, options, upstream, _ = call
    q = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).softmax(1).to(x.dtype).to(device)
    x = x.to(device)
    true, true_dx = truth(x, q.double(), upstream, **options)
    leaf = x.detach().requires_grad_()
    loss = fused_cross_entropy(leaf, negated(q), backend=backend, **options)
    (dx,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    rows, _ = truth(x, q.double(), 0.0, **{**options, "reduction": "none"})
    if rows.isfinite().all() and rows.abs().sum() < torch.finfo(torch.float32).max / 2 and abs(upstream) < torch.inf:
        eps = torch.finfo(x.dtype).eps
        rtol, atol = 2 * eps + 1e-5, 1e-4
        torch.testing.assert_close(loss.double(), true.to(loss.dtype).double(), rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(dx.double(), true_dx, rtol=rtol, atol=max(atol, 2 * eps) * max(abs(upstream), 1.0))


def test_probabilities(backend, device):
    check_probabilities(backend=backend, device=device)
