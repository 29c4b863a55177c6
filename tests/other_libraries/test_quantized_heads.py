"""Heads that bitsandbytes or torchao quantised: not fused, and the report says why; losses and gradients as plain."""

import warnings

import pytest
import torch

from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import llama


def of_bitsandbytes(model, kind):
    nn = pytest.importorskip("bitsandbytes.nn")
    linear = model.lm_head
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    head = getattr(nn, kind)(linear.in_features, linear.out_features, bias=False, **options)
    head.load_state_dict(linear.state_dict())
    model.lm_head = head.to("cpu")


def of_torchao(model, kind):
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, kind)()
    quantization.quantize_(model, config, filter_fn=lambda _, name: name.endswith("lm_head"))
    model.lm_head.weight.requires_grad_(False)


HEADS = {
    "bitsandbytes, 8 bits": (of_bitsandbytes, "Linear8bitLt"),
    "bitsandbytes, 4 bits": (of_bitsandbytes, "Linear4bit"),
    "torchao, int8 weights": (of_torchao, "Int8WeightOnlyConfig"),
}


@pytest.mark.parametrize(("quantize", "kind"), HEADS.values(), ids=HEADS)
def test_a_quantised_head_is_left_as_it_is(quantize, kind):
    ids = torch.arange(28).view(2, 14) % 90 + 3
    found = []
    for patched in (False, True):
        model = llama(hidden_size=64)
        quantize(model, kind)
        if patched:
            patch_model(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = model(input_ids=ids, labels=ids.masked_fill(ids % 5 == 0, -100)).loss
        assert patched == any("nothing was fused" in str(warning.message) for warning in caught)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0])
    report = fusion_report(model)
    assert not report.fused
    assert report.not_fused
