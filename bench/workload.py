"""What they are measured on."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits_and_target(N: int, V: int, ignored: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Random logits (N, V) that want a gradient, and targets of which the share `ignored` is -100."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(N, V, device=DEVICE, dtype=dtype, generator=generator)
    target = torch.randint(0, V, (N,), device=DEVICE, generator=generator)
    order = torch.randperm(N, device=DEVICE, generator=generator)
    target[order[: round(N * ignored)]] = -100
    return x.requires_grad_(), target
