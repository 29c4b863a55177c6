"""The PyTorch backend computes a block of rows at a time, and any number of blocks gives the same results."""

import torch

from fused_ignore_ce import fused_cross_entropy
from fused_ignore_ce.backends.blocks import BLOCK_ELEMENTS


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
