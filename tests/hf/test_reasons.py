"""Where nothing is fused, a warning and the report say why, in the same words."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ignore_ce import defer_logits
from fused_ignore_ce.deferred.report import FusedCalls, FusionReport
from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_tiny import D, QuantizedHead, V, batch, bert, llama, transformers, with_head


class SubclassWeight(torch.Tensor):
    """A weight whose values are computed, as torchao's are."""


class WritesIntoLogits(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits[..., 5:9] = -1e4
        outputs.loss = self.loss_function(outputs.logits, labels, V) if labels is not None else None
        return outputs


def with_weight_of_a_subclass():
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(SubclassWeight))
    return model


_IDS, _CLASSES = batch()["input_ids"], torch.tensor([1, 0])
#: name -> (model, its inputs with labels, what the reason says)
UNFUSED = {
    "a head that multiplies in its own way": (
        with_head(lambda: QuantizedHead(D, V, bias=False)), batch(),
        "its head, a QuantizedHead, makes no product that can be deferred",
    ),
    "a head whose weight is no plain tensor": (
        with_weight_of_a_subclass, batch(),
        "its head multiplies a Tensor of torch.float32 on cpu with a SubclassWeight of torch.float32 on cpu, which "
        "cannot be deferred",
    ),
    "logits that are written to": (
        lambda: llama(WritesIntoLogits), batch(), r"its logits were computed for __setitem__ \(test_reasons.py:\d+\)",
    ),
    "a classifier": (
        lambda: bert("BertForSequenceClassification", num_labels=2), {"input_ids": _IDS, "labels": _CLASSES},
        "its loss was taken of logits that its output embeddings did not make",
    ),
    "a regression": (
        lambda: bert("BertForSequenceClassification", num_labels=1), {"input_ids": _IDS, "labels": _CLASSES.float()},
        "its loss was taken by transformers.models.bert.modeling_bert.forward, not by a cross entropy",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "inputs", "reason"), UNFUSED.values(), ids=UNFUSED)
def test_a_warning_says_once_why_nothing_was_fused_and_the_report_as_well(build, inputs, reason):
    model = patch_model(build())
    name = type(model).__name__
    message = f"model: {name} is patched by fused_ignore_ce and was given labels, but nothing was fused: {reason}"
    with pytest.warns(UserWarning, match=message) as caught:
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
    report = fusion_report(model)
    (said,) = report.not_fused
    assert report.not_fused[said] == 2
    assert any(str(each.message).endswith(f"nothing was fused: {said}") for each in caught)
    assert f"not fused, 2 times: {said}" in str(report)


def test_the_report_on_a_head_that_cannot_be_deferred_does_not_ask_whether_it_is_patched():
    model = patch_model(UNFUSED["a head that multiplies in its own way"][0]())
    F.cross_entropy(model(_IDS).logits.flatten(0, 1), _IDS.flatten()).backward()
    assert str(fusion_report(model)).startswith("not fused, 1 time: its head, a QuantizedHead, makes no product")
    assert str(fusion_report(patch_model(llama()))).endswith("(is it patched?)")
    head = defer_logits(QuantizedHead(D, V, bias=False))
    head(torch.zeros(1, 2, D))
    assert list(fusion_report(head).not_fused) == list(fusion_report(model).not_fused)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_one_call_is_not_called_calls(n):
    end = "" if n == 1 else "s"
    report = FusionReport({"a": FusedCalls(n, n, n)}, {"b": FusedCalls(n, n, n)}, {"max (c.py:1)": n}, {"d": n})
    assert str(report).splitlines()[:-1] == [
        f"fused: a: {n} call{end}, {n} token{end}, {n} of them ignored",
        f"on logits: b: {n} call{end}, {n} token{end}, {n} of them ignored",
        f"not fused, {n} time{end}: d",
        f"logits read by max (c.py:1): {n} time{end}",
    ]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "options"])
def test_a_compiled_model_whose_loss_is_another_says_so_too(options):
    torch._dynamo.reset()
    build, inputs, _ = UNFUSED["a regression"]
    model = patch_model(build(), **options)
    compiled = torch.compile(model, backend="aot_eager")
    if options:
        with pytest.raises(RuntimeError, match=r"label_smoothing.*BertForSequenceClassification"):
            compiled(**inputs)
    else:
        with pytest.warns(UserWarning, match="nothing was fused: its loss was taken by"):
            compiled(**inputs)
        assert len(fusion_report(model).not_fused) == 1


def test_a_model_that_is_fused_says_nothing():
    model = patch_model(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch())
        with torch.no_grad():
            model(**batch())
    assert not fusion_report(model).not_fused
