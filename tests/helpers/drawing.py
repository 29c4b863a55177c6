"""What property tests draw: tensors of any layout, dtype and magnitude."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
UPSTREAM = [1.0, -2.5, 0.0, torch.inf, -torch.inf, torch.nan]


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


def rows_of_logits(draw, rng, N, V, dtypes=tuple(DTYPES), layouts=tuple(LAYOUTS)):
    """Logits (N, V) up to the largest finite number, with masks, in one of the layouts."""
    dtype = draw(st.sampled_from(dtypes))
    finite = torch.finfo(dtype)
    magnitude = min(10.0 ** draw(st.sampled_from([-3, 0, 1, 2, 4, 6, 8, 9, 10, 12, 20, 38, 300])), finite.max)
    x = (torch.randn(N, V, generator=rng, dtype=torch.float64) * magnitude).clamp(finite.min, finite.max)
    if draw(st.booleans()):
        x = x * 10.0 ** -torch.randint(0, 9, (N, 1), generator=rng)  # rows of several magnitudes
    if draw(st.booleans()):
        x[:, :: draw(st.sampled_from([1, 2, 3]))] += magnitude  # large, and close to each other
    for value in draw(st.sampled_from([[], [finite.min], [-torch.inf], [finite.min, finite.max]])):
        x[torch.rand(N, V, generator=rng) < 0.3] = value
    return draw(st.sampled_from(layouts))(x.to(dtype).nan_to_num(nan=0.0, posinf=finite.max, neginf=-torch.inf))


def index_targets(rng, N, V):
    y = torch.randint(0, max(V, 1), (N,), generator=rng)
    return y.masked_fill(torch.rand(N, generator=rng) < 0.3, -100)


def finite(x):
    """The values with the lowest finite number for -inf: 0 * inf is NaN in a matrix product."""
    return x.resolve_neg().clamp(min=torch.finfo(x.dtype).min)


def head_of(x):
    """A head with which hidden states are their logits, exactly."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


def judge(found, true, rows, upstream, ignored, *, capped=False, size=1.0):
    """Compares (loss, gradient) with those of float64, unless sums of the rows' losses overflow in the dtype of sums.

    Gradients are exactly 0 where `ignored` (N, V). `size` (N, 1) is the size of what is added up to the loss of a row.
    """
    (loss, dx), (true_loss, true_dx) = found, true
    assert (dx[ignored] == 0).all()
    wide = dx.dtype == torch.float64
    if rows.isnan().any() or rows.abs().sum() >= torch.finfo(dx.dtype if wide else torch.float32).max / 2:
        return
    eps = torch.finfo(dx.dtype).eps
    rtol, atol = 2 * max(eps, 1e-12 if wide else 1e-6), (1e-10 if wide else 1e-5) * (10 if capped else 1)

    def close(ours, true, rtol, atol):
        with_nan = torch.isclose(ours.double(), true.double(), rtol=rtol, atol=0.0, equal_nan=True)
        off = (ours.double() - true.double()).abs() / atol
        assert (with_nan | (off <= 1)).all(), f"ours: {ours}\ntrue: {true}\ntimes what is allowed: {off.max()}"

    of_rows = torch.as_tensor(size, dtype=torch.float64, device=dx.device)
    of_loss = of_rows.sum() if loss.dim() == 0 else of_rows.reshape(-1)
    close(loss, true_loss.to(loss.dtype), rtol, atol * of_loss)
    true_dx = true_dx.masked_fill(ignored, 0.0)
    if abs(upstream) < torch.inf:
        close(dx, true_dx.to(dx.dtype), 5 * rtol, max(atol, 2 * eps) * max(abs(upstream), 1.0) * of_rows)
    else:
        assert not dx[true_dx.abs() > 1e-3].isfinite().any()
