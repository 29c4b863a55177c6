"""Log-probabilities and entropies of a small head, by PyTorch."""

import torch
import torch.nn.functional as F

N, V, D = 5, 70, 4
TEMPERATURE, CAP, SCALE = 0.7, 3.0, 1.3


def problem(device="cpu"):
    h = torch.randn(N, D, dtype=torch.float64, device=device, requires_grad=True)
    w = (2 * torch.randn(V, D, dtype=torch.float64, device=device)).requires_grad_()
    b = torch.randn(V, dtype=torch.float64, device=device, requires_grad=True)
    return h, w, b, torch.tensor([3, -100, 69, 0, 12], device=device)


def plain(h, w, b, y, cap=CAP, temperature=TEMPERATURE):
    """(log_probs, entropy), 0 at ignored rows."""
    x = SCALE * F.linear(h, w, b)
    x = x if cap is None else cap * torch.tanh(x / cap)
    log_p = (x / temperature).log_softmax(-1)
    kept = y != -100
    chosen = log_p.gather(-1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(kept, chosen, 0.0), torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0.0)
