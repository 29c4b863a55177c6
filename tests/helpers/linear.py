"""Hidden states and heads, and the gradients of their losses."""

import torch


def problem(N, V, D, dtype=torch.float32, bias=True, device="cpu"):
    """Hidden states, head and bias whose logits are of the order of 1; targets with the first and last class."""
    h = torch.randn(N, D, dtype=torch.float64).to(device, dtype)
    w = (torch.randn(V, D, dtype=torch.float64) / max(D, 1) ** 0.5).to(device, dtype)
    b = torch.randn(V, dtype=torch.float64).to(device, dtype) if bias else None
    y = torch.randint(0, V, (N,), device=device)
    y[:2] = torch.tensor([0, V - 1], device=device)[:N]
    return h, w, b, y


def gradients(loss, tensors, factor=-1.5):
    """The loss and its gradients for an upstream gradient that is not 1."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = loss(*leaves)
    return value, *torch.autograd.grad(value, leaves, torch.full_like(value, factor))
