"""Who is measured: name -> loss, all with ignore_index=-100 and a mean over the kept rows."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy

Loss = Callable[..., Any]

#: loss(logits, target). What the ratios are relative to comes first: what transformers does.
LOGITS_LOSSES: dict[str, Loss] = {
    "F.cross_entropy(x.float(), y)": lambda x, y: F.cross_entropy(x.float(), y),
    "F.cross_entropy(x, y)": F.cross_entropy,
    "fused_cross_entropy(x, y)": fused_cross_entropy,
}

#: loss(hidden, weight, target). What the ratios are relative to comes first.
LINEAR_LOSSES: dict[str, Loss] = {
    "F.cross_entropy(F.linear(h, w), y)": lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
    "fused_linear_cross_entropy(h, w, y)": fused_linear_cross_entropy,
}

#: Since torch 2.13. It chunks with its default options.
if hasattr(F, "linear_cross_entropy"):
    from torch.nn import LinearCrossEntropyOptions

    LINEAR_LOSSES["F.linear_cross_entropy(h, w, y, options=...)"] = lambda h, w, y: F.linear_cross_entropy(
        h, w, y, options=LinearCrossEntropyOptions()
    )
