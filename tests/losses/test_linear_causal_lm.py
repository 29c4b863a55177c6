"""`fused_linear_causal_lm_loss` is `fused_causal_lm_loss` of the head's logits, which are never there."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_causal_lm_loss, fused_linear_causal_lm_loss

B, T, V, D = 2, 6, 70, 5


def problem(device):
    h = torch.randn(B, T, D, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(V, D, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.randint(3, V, (B, T), device=device)
    labels[:, :2] = -100
    labels[1, 4] = 2
    return h, w, labels


CASES = {
    "mean": {},
    "several ids": {"ignore_index": [-100, 2]},
    "number of items": {"num_items_in_batch": 5},
    "tensor of items": {"num_items_in_batch": torch.tensor([5])},
    "rows": {"reduction": "none"},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.1, "logit_scale": 0.5},
    "token weights": {"token_weight": torch.arange(1.0, B * T + 1).view(B, T)},
}


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_the_loss_of_logits(options, shifted, backend, device):
    h, w, labels = problem(device)
    options = {k: v.to(device) if k == "token_weight" else v for k, v in options.items()}
    given = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
    ours = fused_linear_causal_lm_loss(h, w, **given, backend=backend, **options)
    true = fused_causal_lm_loss(F.linear(h, w), **given, backend="torch", **options)
    torch.testing.assert_close(ours, true)
    upstream = torch.randn_like(true)
    for one, other in zip(
        torch.autograd.grad(ours, (h, w), upstream), torch.autograd.grad(true, (h, w), upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_against_pytorch(backend, device):
    h, w, labels = problem(device)
    bias = torch.randn(V, dtype=torch.float64, device=device)
    ours, stats = fused_linear_causal_lm_loss(h, w, labels, linear_bias=bias, return_stats=True, backend=backend)
    logits = F.linear(h, w, bias)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels[:, 1:].flatten()))
    assert stats.num_tokens == B * (T - 2)
    assert stats.lse.shape == (B, T)
    assert (stats.lse[:, -1] == 0).all()


def test_only_kept_rows_are_gathered(device, monkeypatch):
    """The shift copies no hidden states. The gather of kept rows drops the last position like any ignored row."""
    from fused_ignore_ce.linear import kept_rows

    h, w, labels = problem(device)
    seen = []
    original = kept_rows._kept
    monkeypatch.setattr(
        kept_rows, "_kept", lambda position, may: seen.append(position.operands.h) or original(position, may)
    )
    fused_linear_causal_lm_loss(h, w, labels)
    assert [t.data_ptr() for t in seen] == [h.data_ptr()]


def test_dtypes_and_mistakes(device):
    h, w, labels = problem(device)
    assert fused_linear_causal_lm_loss(h.bfloat16(), w.bfloat16(), labels).dtype == torch.float32
    assert fused_linear_causal_lm_loss(h, w, labels).dtype == torch.float64
    with pytest.raises(TypeError, match="labels: expected a Tensor, here or as shift_labels, got NoneType"):
        fused_linear_causal_lm_loss(h, w, None)
    with pytest.raises((ValueError, RuntimeError), match="target"):
        fused_linear_causal_lm_loss(h, w, labels[:, 1:])
