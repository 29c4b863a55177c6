"""Tensors of any strides give the right results, and none of the caller's tensors is written."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy
from fused_ignore_ce.backends.blocks import BLOCK_ELEMENTS

N, V = 6, 700


def transposed(device):
    return torch.randn(V, N, device=device).t()


def row_strided(device):
    return torch.randn(N, V + 13, device=device)[:, :V]


def offset(device):
    return torch.randn(N, V + 13, device=device)[:, 13:]


def every_other_class(device):
    return torch.randn(N, 2 * V, device=device)[:, ::2]


def every_other_row(device):
    return torch.randn(2 * N, V, device=device)[::2]


def expanded_rows(device):
    return torch.randn(1, V, device=device).expand(N, V)


def expanded_classes(device):
    return torch.randn(N, 1, device=device).expand(N, V)


def time_sliced(device):
    return torch.randn(2, 4, V, device=device)[:, :3].transpose(1, 2)


def channels_last(device):
    return torch.randn(2, 40, 3, 5, device=device).to(memory_format=torch.channels_last)


def cropped_image(device):
    return torch.randn(2, 40, 4, 6, device=device)[:, :, 1:3, 2:]


MAKERS = [
    transposed, row_strided, offset, every_other_class, every_other_row, expanded_rows, expanded_classes,
    time_sliced, channels_last, cropped_image,
]  # fmt: skip


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_strides(make, probs, backend, device):
    x = make(device)
    if probs:
        target = torch.rand_like(x) if make not in (expanded_rows, expanded_classes) else make(device).sigmoid()
    else:
        target = torch.randint(0, x.shape[1], (x.shape[0], *x.shape[2:]), device=device)
        target.view(-1)[1] = -100
    before = x.clone()
    ours, ref = x.detach().requires_grad_(), x.detach().requires_grad_()
    loss = fused_cross_entropy(ours, target, backend=backend)
    expected = F.cross_entropy(ref, target)
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, ref.grad)
    assert torch.equal(x, before), "the caller's logits were written"
    assert ours._version == 0


def test_target_strides(backend, device):
    x = torch.randn(N, V, device=device)
    target = torch.randint(0, V, (N, 3), device=device)[:, 1]
    torch.testing.assert_close(fused_cross_entropy(x, target, backend=backend), F.cross_entropy(x, target))
    scalar = target[:1].expand(N)
    torch.testing.assert_close(fused_cross_entropy(x, scalar, backend=backend), F.cross_entropy(x, scalar))


def test_weight_strides(backend, device):
    x, target = torch.randn(N, V, device=device), torch.randint(0, V, (N,), device=device)
    for weight in (torch.rand(V, 2, device=device)[:, 1], torch.rand(1, device=device).expand(V)):
        options = {"label_smoothing": 0.1, "weight": weight}
        ours = fused_cross_entropy(x, target, backend=backend, **options)
        torch.testing.assert_close(ours, F.cross_entropy(x, target, **options))


def test_several_blocks_of_rows(device, monkeypatch):
    """The PyTorch backend's blocks: more than one, the last one short, ignored rows between."""
    x = torch.randn(2, 50, 30, device=device).transpose(1, 2)[..., :49]
    target = torch.randint(0, 30, (2, 49), device=device)
    for ignored in (None, slice(None, None, 3)):
        if ignored is not None:
            target[:, ignored] = -100
        results = []
        for block in (BLOCK_ELEMENTS, 30 * 8):
            monkeypatch.setattr("fused_ignore_ce.backends.blocks.BLOCK_ELEMENTS", block)
            leaf = x.detach().requires_grad_()
            loss = fused_cross_entropy(leaf, target, backend="torch", label_smoothing=0.1, softcap=5.0)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)


def test_more_than_2_31_elements(backend, device):
    """The second row starts past 2^31 elements. Only the two rows are ever touched, so little memory is used."""
    torch.use_deterministic_algorithms(False)  # would fill the 4 GiB
    far = 2**31 + 8
    storage = torch.empty(far + V, dtype=torch.float16, device=device)
    x = storage.as_strided((2, V), (far, 1))
    x.copy_(torch.randn(2, V))
    dense = x.clone().requires_grad_()
    target = torch.tensor([3, V - 1], device=device)
    expected = F.cross_entropy(dense.float(), target)
    expected.backward()
    leaf = x.detach().requires_grad_()
    loss = fused_cross_entropy(leaf * 1.0 if device == "cuda" else leaf, target, inplace_backward=True, backend=backend)
    torch.testing.assert_close(loss.float(), expected, atol=5e-3, rtol=0)
    loss.backward()
    torch.testing.assert_close(leaf.grad, dense.grad)
    torch.testing.assert_close(x, dense.grad)  # in place: the far row was written where it lies
