"""A student and a teacher, small, for the tests of distillation."""

import torch
import torch.nn.functional as F

N, V, D, E, K = 7, 23, 5, 6, 4
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TARGET = torch.tensor([3, 0, -100, 22, 5, -100, 1])


def tensors(dtype=torch.float64, seed=0):
    """Student's and teacher's hidden states, heads and biases."""
    torch.manual_seed(seed)
    sizes = (N, D), (V, D), (V,), (N, E), (V, E), (V,)
    made = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    return [t.requires_grad_() for t in made[:3]] + made[3:]


def logits_of(h, w, b):
    return F.linear(h.double(), w.double(), b.double())


def gradients(loss, leaves, seed=1):
    """Of the loss with an upstream gradient that is not 1, called twice."""
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    return first
