"""Heads in other modules, with hooks, parametrized or compiled: losses and gradients are the unpatched model's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ignore_ce.deferred import affine
from fused_ignore_ce.hf import patch_model

from ..helpers.hf_tiny import D, V, assert_same_step, batch, llama


class CastOutputToFloat(nn.Sequential):
    """What PEFT's examples put around a head."""

    def forward(self, hidden):
        return super().forward(hidden).to(torch.float32)


class FloatHead(nn.Module):
    """A head of float32 in a model of another dtype."""

    def __init__(self, head):
        super().__init__()
        self.head = head.float()

    def forward(self, hidden):
        return self.head(hidden.float())


class CastingHead(nn.Linear):
    """Its weight has the model's dtype, its product is one of float32, under autocast as well."""

    def forward(self, hidden):
        with torch.autocast("cpu", enabled=False):
            return F.linear(hidden.float(), self.weight.float())


def cast_by_trl(head):
    """`cast_lm_head_to_fp32` of TRL's GRPO."""
    head = head.float()
    head.forward = lambda hidden: F.linear(hidden.to(torch.float32), head.weight.to(torch.float32), None)
    return head


def casting(head):
    made = CastingHead(D, V, bias=False)
    made.weight = head.weight
    return made


#: name -> (what is put around a head, the dtype of its product in a bfloat16 model and under autocast)
AROUND = {
    "Sequential": (nn.Sequential, torch.bfloat16, torch.bfloat16),
    "norm before it": (
        lambda head: nn.Sequential(nn.LayerNorm(D, dtype=head.weight.dtype), head),
        *[torch.bfloat16] * 2,
    ),
    "CastOutputToFloat": (CastOutputToFloat, torch.bfloat16, torch.bfloat16),
    "float32 head": (FloatHead, torch.float32, torch.bfloat16),
    "casting head": (casting, torch.float32, torch.float32),
    "TRL": (cast_by_trl, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("patched", ["before", "after"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", AROUND)
def test_a_head_in_another_module(name, precision, patched, took, monkeypatch):
    around, *dtypes = AROUND[name]
    dtypes = dict(zip(("bfloat16", "autocast"), dtypes, strict=True))

    def built(patch):
        model = llama().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        if patch == "before":
            patch_model(model)
        model.lm_head = around(model.lm_head)
        return patch_model(model) if patch == "after" else model

    def stepped(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outputs = model(**batch())
        (outputs.loss * 0.5).backward()
        return outputs, {name: p.grad for name, p in model.named_parameters()}

    products = []
    right = affine.fused_linear_cross_entropy

    def spied(hidden, *args, **kwargs):
        products.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype)
        return right(hidden, *args, **kwargs)

    monkeypatch.setattr(affine, "fused_linear_cross_entropy", spied)
    plain, ours = stepped(built(None)), stepped(built(patched))
    assert took == ["linear"]
    assert products == [dtypes.get(precision, torch.float32)]
    assert not ours[0].logits.is_materialized
    assert ours[0].logits.dtype == plain[0].logits.dtype
    if products == [torch.float32]:
        assert torch.equal(ours[0].logits.detach().materialize(), plain[0].logits)
        assert_same_step(ours, plain) if precision == "float32" else assert_close(ours, plain, 1e-5)
    else:  # the fused loss does not round its logits
        assert_close(ours, plain, 3e-2)


def assert_close(ours, plain, rel):
    torch.testing.assert_close(ours[0].loss, plain[0].loss, rtol=rel, atol=0)
    for name, expected in plain[1].items():
        size = expected.abs().max().item()
        assert size > 0, name
        assert (ours[1][name] - expected).abs().max().item() <= max(rel, 1e-2) * size, name  # bfloat16 below the head
