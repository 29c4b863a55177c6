"""What they are measured on."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(*shape, device=DEVICE, dtype=dtype, generator=generator)


def targets(N: int, V: int, ignored: float) -> Tensor:
    """N of them, of which the share `ignored` is -100."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    target = torch.randint(0, V, (N,), device=DEVICE, generator=generator)
    order = torch.randperm(N, device=DEVICE, generator=generator)
    target[order[: round(N * ignored)]] = -100
    return target


def logits_and_target(N: int, V: int, ignored: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Random logits (N, V) that want a gradient, and targets."""
    return _random(N, V, dtype=dtype).requires_grad_(), targets(N, V, ignored)


def hidden_and_target(
    N: int, V: int, D: int, ignored: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D) and a head (V, D) that want gradients, with logits of the order of 1; and targets."""
    h = _random(N, D, dtype=dtype).requires_grad_()
    w = _random(V, D, dtype=dtype).div_(D**0.5).requires_grad_()
    return h, w, targets(N, V, ignored)
