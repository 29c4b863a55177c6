"""What a loss and its gradients should be, PyTorch's own of float64 logits, and how far from it a result is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: `loss(logits, target)`.
Truth = Callable[[Tensor, Tensor], Tensor]


def expected(
    inputs: Sequence[Tensor], target: Tensor, loss: Truth = F.cross_entropy, upstream: Tensor | float = 1.0
) -> list[Tensor]:
    """The loss and the gradients of logits, or of hidden states and head, in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    value = loss(exact[0] if len(exact) == 1 else F.linear(*exact), target)
    weights = torch.as_tensor(upstream, dtype=value.dtype, device=value.device).expand_as(value)
    return [value.detach(), *torch.autograd.grad(value, exact, weights)]


def fault(name: str, found: Tensor | None, wanted: Tensor, tolerance: float) -> str | None:
    """Says how a tensor differs from what it should be; None if by no more than a share of the largest value."""
    if found is None:
        return f"{name} is None"
    error = (found.detach().double() - wanted).abs().max().item()
    largest = max(wanted.abs().max().item(), 1e-3)
    if error <= tolerance * largest:  # false for NaN
        return None
    return f"{name} is NaN" if error != error else f"{name} is off by {error / largest:.1%} of its largest value"
