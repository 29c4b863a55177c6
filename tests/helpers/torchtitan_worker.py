"""torchtitan's debug model and loss on a CPU, in one process or sharded by FSDP2 over the ranks of `ranks.py`."""

from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

IDS = torch.arange(48).mul(37).remainder(211).view(3, 16)
LABELS = IDS.masked_fill(torch.arange(48).view(3, 16) % 5 == 0, -100)


def attention(self, q, k, v, **_):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def step(code=None, num_chunks=1, sharded=False):
    """The loss, the gradients, and the report; with `code`, of the `FusedLoss` that it defines.

    The trainer gives the head to the loss, which takes hidden states.
    """
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.llama3 import model_registry

    from fused_ignore_ce.hf import fusion_report

    scope = {"FusedLoss": ChunkedLossWrapper}
    exec(code or "", scope)
    loss_fn = scope["FusedLoss"].Config(num_chunks=num_chunks).build()
    assert isinstance(loss_fn, ChunkedLossWrapper)  # what the trainer looks for
    torch.manual_seed(0)
    model = model_registry("debugmodel").model.build()
    model.init_states()
    ids, labels = IDS, LABELS
    if sharded:
        fully_shard(model.lm_head)
        fully_shard(model)
        ids, labels = IDS.roll(dist.get_rank(), 0)[:2], LABELS.roll(dist.get_rank(), 0)[:2]
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    with mock.patch.object(FlexAttention, "forward", attention):  # FlexAttention has no backward on a CPU
        hidden = model(ids, torch.arange(16).expand(len(ids), 16))
        loss, _ = loss_fn(hidden, labels, (labels != -100).sum())
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    report = fusion_report(model.lm_head) if code else None
    return loss.detach(), gradients, report and (sum(kind.calls for kind in report.fused.values()), dict(report.reads))
