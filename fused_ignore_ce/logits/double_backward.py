"""The gradients of rows with a graph of their own, for `create_graph=True`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference
from ..core.options import LossOptions
from ..core.rows import Logits, Upstream


def differentiable_backward(
    upstream: Upstream, logits: Logits, options: LossOptions, need_dx: bool, need_dprobs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dprobs) with a graph of their own, from the reference; it holds several tensors of x's shape."""
    x, target, weight, probs = logits
    acc = x.double() if x.dtype == torch.float64 else x.float()
    rows = reference.rows(acc, target.view(x.shape[:2]), weight, probs, **options._replace(z_loss=0.0)._asdict())
    pairs = ((rows.loss, upstream.dloss), (rows.lse, upstream.dlse), (rows.entropy, upstream.dentropy))
    outputs, gradients = zip(*((out.flatten(), grad) for out, grad in pairs if grad is not None), strict=True)
    wanted = [t for t, needed in ((x, need_dx), (probs, need_dprobs)) if needed and t is not None]
    found = list(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return found.pop(0) if need_dx else None, found.pop(0) if need_dprobs else None
