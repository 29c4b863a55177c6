"""Ignored rows: any id, several ids, not read, exactly zero."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy

V = 1200


def rows(device, *targets):
    x = torch.randn(len(targets), V, device=device)
    return x.requires_grad_(), torch.tensor(targets, device=device)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, V - 1, V, 10**12, -(2**63), 2**63 - 1])
def test_any_value(ignore_index, backend, device):
    x, y = rows(device, 3, ignore_index, 7)
    loss = fused_cross_entropy(x, y, ignore_index=ignore_index, backend=backend)
    loss.backward()
    kept = x.detach()[[0, 2]].requires_grad_()
    expected = F.cross_entropy(kept, y[[0, 2]])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad[[0, 2]], kept.grad)
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize("collection", [tuple, list, set, frozenset, lambda ids: dict.fromkeys(ids).keys()])
def test_several_ids(collection, backend, device):
    x, y = rows(device, 3, -100, 7, 0, V + 4, 9)
    loss = fused_cross_entropy(x, y, ignore_index=collection([-100, 0, V + 4]), backend=backend, reduction="sum")
    torch.testing.assert_close(loss, F.cross_entropy(x[[0, 2, 5]], y[[0, 2, 5]], reduction="sum"))
    loss.backward()
    assert x.grad.abs().sum(1).ne(0).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_not_read(reduction, poison, backend, device):
    x, y = rows(device, 3, -100, 7)
    with torch.no_grad():
        x[1] = poison
    loss, stats = fused_cross_entropy(x, y, reduction=reduction, return_stats=True, z_loss=1e-3, label_smoothing=0.1,
                                      softcap=30.0, backend=backend)  # fmt: skip
    loss.backward(torch.full_like(loss, 3.0))
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0).all()
    assert stats.num_tokens == 2
    assert (stats.lse[1], stats.entropy[1], stats.correct[1]) == (0, 0, False)
    if reduction == "none":
        assert loss[1] == 0


@pytest.mark.parametrize("upstream", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(reduction, upstream, backend, device):
    x, y = rows(device, -100, -100, -100)
    loss = fused_cross_entropy(x, y, reduction=reduction, backend=backend)
    expected = F.cross_entropy(x, y, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.backward(torch.full_like(loss, upstream))
    assert (x.grad == 0).all()


def test_all_ignored_with_a_normalizer_is_zero(backend, device):
    x, y = rows(device, -100, -100)
    assert fused_cross_entropy(x, y, normalizer=5, backend=backend) == 0


def test_token_weight_zero_is_ignored_even_with_a_bad_target(backend, device):
    x, y = rows(device, 3, V + 1, 7)
    token_weight = torch.tensor([1.0, 0.0, 1.0], device=device)
    loss = fused_cross_entropy(x, y, token_weight=token_weight, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(x[[0, 2]], y[[0, 2]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_masked_vocabulary(probs, smoothing, backend, device):
    """Masked classes, among them the whole first block, have gradient 0. The other classes are as if alone."""
    C, masked = 9000, 8500
    x = torch.randn(3, C, device=device)
    x[:, :masked] = -torch.inf
    x.requires_grad_()
    y = torch.tensor([8600, 8999, 8500], device=device)
    target = F.one_hot(y, C).float() if probs else y
    loss = fused_cross_entropy(x, target, label_smoothing=smoothing, backend=backend)
    loss.backward()
    assert (x.grad[:, :masked] == 0).all()
    assert x.grad.isfinite().all()
    if smoothing:  # as in PyTorch, uniform mass on an impossible class is an infinite loss
        assert loss == torch.inf
        return
    short = x.detach()[:, masked:].requires_grad_()
    expected = F.cross_entropy(short, y - masked)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad[:, masked:], short.grad)


def test_masked_vocabulary_with_smoothing_off_the_mask(backend, device):
    """A class weight of 0 takes a masked class out of the smoothing sum."""
    x = torch.randn(2, 50, device=device)
    x[:, :20] = -torch.inf
    x.requires_grad_()
    weight = torch.ones(50, device=device)
    weight[:20] = 0
    loss = fused_cross_entropy(x, torch.tensor([30, 40], device=device), weight, label_smoothing=0.1, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_a_row_of_minus_infinity(backend, device):
    x = torch.full((2, 40), -torch.inf, device=device)
    x[1] = 0
    x.requires_grad_()
    loss = fused_cross_entropy(x, torch.tensor([1, 2], device=device), reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert (x.grad[0] == 0).all()
    assert x.grad[1].abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_not_hidden(bad, backend, device):
    x, y = rows(device, 3, 5)
    with torch.no_grad():
        x[0, 100] = bad
    loss = fused_cross_entropy(x, y, reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert x.grad[0].isnan().any()
    assert x.grad[1].isfinite().all()
