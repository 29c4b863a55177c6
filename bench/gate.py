"""No speed is measured of a loss that is wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gradients(loss: Callable[..., Any], *arguments: Tensor) -> tuple[Tensor, ...]:
    """What is timed: forward and backward, until the device has done it."""
    wanted = [t for t in arguments if t.requires_grad]
    found = torch.autograd.grad(loss(*arguments), wanted)
    if found[0].is_cuda:
        torch.cuda.synchronize()
    return found


def gate(loss: Callable[..., Any], baseline: Callable[..., Any], *arguments: Tensor) -> None:
    """Fails unless the loss's gradients are those of the baseline in float64."""
    wide = [t.detach().double().requires_grad_() if t.requires_grad else t for t in arguments]
    for found, true in zip(gradients(loss, *arguments), gradients(baseline, *wide), strict=True):
        error = (found.double() - true).abs().max()
        assert error <= 2**-7 * true.abs().max(), f"wrong gradient: off by {error}"
