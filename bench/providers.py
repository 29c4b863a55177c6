"""Who is measured: name -> loss(logits, target), all with ignore_index=-100 and a mean over the kept rows."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fused_ignore_ce import fused_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]

#: What the ratios are relative to: what transformers does.
BASELINE = "F.cross_entropy(x.float(), y)"

LOGITS_LOSSES: dict[str, Loss] = {
    BASELINE: lambda x, y: F.cross_entropy(x.float(), y),
    "F.cross_entropy(x, y)": F.cross_entropy,
    "fused_cross_entropy(x, y)": fused_cross_entropy,
}
OURS = "fused_cross_entropy(x, y)"
