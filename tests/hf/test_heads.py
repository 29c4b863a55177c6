"""`patch_model`: whatever the head is, loss and gradients are those of the unpatched model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import patch_model

from ..helpers.hf_tiny import (
    TINY,
    D,
    QuantizedHead,
    V,
    assert_same_step,
    batch,
    bert,
    llama,
    step,
    transformers,
    with_head,
)


class MatmulHead(transformers.LlamaForCausalLM):
    """A model whose head is a product with the input embedding's weight. It calls no head module."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        logits = hidden @ self.model.embed_tokens.weight.t()
        return transformers.modeling_outputs.CausalLMOutput(loss=self.loss_function(logits, labels, V), logits=logits)


class TransformHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(D, D)
        self.decoder = nn.Linear(D, V)

    @property
    def weight(self):
        return self.decoder.weight

    def forward(self, hidden):
        return self.decoder(torch.tanh(self.dense(hidden))) * 0.5


class CriterionInForward(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        logits = outputs.logits[:, :-1].permute(0, 2, 1)
        outputs.loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels[:, 1:])
        return outputs


#: name -> (model, how its loss is taken)
HEADS = {
    "linear": (llama, "linear"),
    "bias": (with_head(lambda: nn.Linear(D, V)), "linear"),
    "tied": (lambda: llama(tie_word_embeddings=True), "linear"),
    "transform": (with_head(TransformHead), "linear"),
    "sequential": (with_head(lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V))), "linear"),
    "quantized": (with_head(lambda: QuantizedHead(D, V, bias=False)), "logits"),
    "embedding-as-projection": (lambda: llama(MatmulHead), "linear"),
    "criterion-in-forward": (lambda: llama(CriterionInForward), "linear"),
    "masked-lm": (lambda: bert("BertForMaskedLM"), "linear"),
    "token-classification": (lambda: bert("BertForTokenClassification", num_labels=V), "logits"),
    "float64": (lambda: llama().double(), "linear"),
    "bfloat16": (lambda: llama().bfloat16(), "linear"),
    "frozen-head": (lambda: _frozen(llama(), "lm_head"), "linear"),
    "frozen-body": (lambda: _frozen(llama(), "model"), "linear"),
}


def _frozen(model, name):
    getattr(model, name).requires_grad_(False)
    return model


def test_tuples_hold_deferred_logits(took):
    model = llama()
    plain = model(**batch(), return_dict=False)
    ours = patch_model(model)(**batch(), return_dict=False)
    torch.testing.assert_close(ours[0], plain[0])
    assert isinstance(ours[1], DeferredLogits)
    assert torch.equal(ours[1].detach().materialize(), plain[1])
    assert took == ["linear"]


@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_the_unpatched_loss_and_gradients(name, took):
    build, way = HEADS[name]
    model = build()
    plain = step(model, **batch())
    assert took == []
    assert patch_model(model) is model
    ours = step(model, **batch())
    assert took == [way]
    assert isinstance(ours[0].logits, DeferredLogits) == (way == "linear")
    if way == "linear":
        assert not ours[0].logits.is_materialized
    if name == "bfloat16":  # the fused loss does not round logits to bfloat16
        torch.testing.assert_close(ours[0].loss, plain[0].loss, rtol=2e-2, atol=0)
    else:
        assert_same_step(ours, plain)
    assert torch.equal(ours[0].logits * 1, plain[0].logits)


@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": torch.tensor(40)},
        {"num_items_in_batch": 7},
        {"shift_labels": F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()},
        {"logits_to_keep": 5, "shift_labels": batch()["labels"][:, -5:].contiguous()},
        {"ignore_index": 9},
        {"attention_mask": torch.ones(2, 9, dtype=torch.int64).tril(4)},
    ],
    ids=lambda extra: "-".join(extra),
)
def test_arguments_of_the_forward_mean_what_they_meant(extra, took):
    model = llama()
    inputs = batch() | extra
    if "ignore_index" in extra:
        inputs["labels"] = inputs["labels"].clamp(min=9)
    plain = step(model, **inputs)
    assert_same_step(step(patch_model(model), **inputs), plain)
    assert took == ["linear"]


def test_softcap_and_scale_of_the_model_are_kept(took):
    torch.manual_seed(0)
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**TINY, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0)
    )
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(**TINY, logit_scale=0.25))
    for model in (gemma, cohere):
        plain = step(model, **batch())
        assert_same_step(step(patch_model(model), **batch()), plain)
    assert took == ["linear", "linear"]


def test_all_ignored_is_nan_with_zero_gradients():
    model = patch_model(llama())
    outputs, grads = step(model, input_ids=batch()["input_ids"], labels=torch.full((2, 9), -100))
    assert outputs.loss.isnan()
    assert all((g == 0).all() for g in grads.values())


def test_a_label_outside_of_the_vocabulary_is_an_index_error():
    inputs = batch()
    inputs["labels"][1, 3] = V
    with pytest.raises(IndexError, match=str(V)):
        patch_model(llama())(**inputs)


def test_without_labels_and_gradients_the_original_code_runs(took):
    model = llama()
    input_ids = batch()["input_ids"]
    plain, generated = model(input_ids).logits, model.generate(input_ids, max_new_tokens=3, do_sample=False)
    patch_model(model)
    with torch.no_grad():
        logits = model(input_ids).logits
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, plain)
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), generated)
    assert took == []
