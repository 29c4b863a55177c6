"""The reference, which other tests take for the truth, is PyTorch's loss where PyTorch has one."""

import torch

from fused_ignore_ce.backends import reference


def test_reference_is_pytorch():
    """The reference itself equals F.cross_entropy in float64."""
    x, y, w = torch.randn(6, 9, 2).double(), torch.randint(0, 9, (6, 2)), torch.rand(9).double()
    y[0] = -100
    for target in (y, torch.rand(6, 9, 2).double()):
        for reduction in ("mean", "sum", "none"):
            options = {"reduction": reduction, "label_smoothing": 0.2}
            expected = torch.nn.functional.cross_entropy(x, target, w, **options)
            torch.testing.assert_close(reference.cross_entropy(x, target, w, **options), expected)
