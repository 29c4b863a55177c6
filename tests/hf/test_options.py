"""`patch_model`: options reach the model's loss and no other. Options that reach none are an error."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.hf import forward, patch_model, patch_transformers, unpatch_model

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


def test_ignore_index_adds_ids_to_the_models_own():
    model, inputs = llama(), batch()
    masked = inputs | {"labels": inputs["labels"].where(~torch.isin(inputs["labels"], torch.tensor([7, 11, 30])), -100)}
    assert (masked["labels"] != inputs["labels"]).any()
    plain = step(model, **masked)
    assert_same_step(step(patch_model(model, ignore_index=[7, 11, 30]), **inputs), plain)
    for special in (7, 11, 30):
        patch_model(model, ignore_index=special)  # patching again replaces
    outputs, _ = step(model, **inputs)
    only_30 = inputs | {"labels": inputs["labels"].where(inputs["labels"] != 30, -100)}
    torch.testing.assert_close(outputs.loss, unpatch_model(model)(**only_30).loss)


@pytest.mark.parametrize("build", [llama, with_head(lambda: QuantizedHead(D, V, bias=False))], ids=["linear", "logits"])
def test_options_of_the_loss(build):
    model, inputs = build(), batch()
    logits = model(inputs["input_ids"]).logits[:, :-1].flatten(0, 1).double()
    target = inputs["labels"][:, 1:].flatten()
    options = {"label_smoothing": 0.2, "weight": torch.linspace(0.5, 1.5, V)}
    true = F.cross_entropy(logits, target, options["weight"].double(), label_smoothing=0.2)
    ours = patch_model(model, **options)(**inputs).loss
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=0)
    kept = target != -100
    capped = 2 * torch.tanh(3 * logits / 2)
    rows = F.cross_entropy(capped, target, reduction="none") + 0.1 * capped.logsumexp(1) ** 2
    ours = patch_model(model, softcap=2.0, logit_scale=3.0, z_loss=0.1, memory_budget=2**20)(**inputs).loss
    torch.testing.assert_close(ours.double(), rows[kept].mean(), rtol=1e-5, atol=0)


def test_a_second_softcap_is_applied_to_the_models_capped_logits(took):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**TINY, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0)
    model, inputs = transformers.Gemma2ForCausalLM(config), batch()
    logits = model(inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    true = F.cross_entropy(torch.tanh(logits), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(patch_model(model, softcap=1.0)(**inputs).loss, true)
    assert took == ["logits"]


def test_options_do_not_touch_other_losses_of_the_model(took):
    """Next-sentence prediction has the classes 0 and 1. They are no token ids, and are not ignored."""
    model = bert("BertForPreTraining")
    inputs = batch() | {"next_sentence_label": torch.tensor([0, 1])}
    masked = inputs | {"labels": inputs["labels"].masked_fill(inputs["labels"] == 7, -100)}
    plain = step(model, **masked)
    assert_same_step(step(patch_model(model, ignore_index=[0, 1, 7]), **inputs), plain)
    assert took == ["linear"]


def test_a_model_that_hands_its_labels_to_another_inside_it(took):
    torch.manual_seed(0)
    text = TINY | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "sep_token_id": 3, "encoder_hidden_size": D}
    vision = TINY | {"image_size": 8, "patch_size": 4}
    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=D)
    ).eval()
    inputs = batch() | {"pixel_values": torch.rand(2, 3, 8, 8)}
    plain = step(model, **inputs)
    assert_same_step(step(patch_model(model), **inputs), plain)
    assert took == ["linear"]
    labels = inputs["labels"].masked_fill(inputs["labels"] == 9, -100)
    masked = step(unpatch_model(model), **inputs | {"labels": labels})
    assert_same_step(step(patch_model(model, ignore_index=9), **inputs), masked)
    assert type(unpatch_model(model).text_decoder) is type(copy.deepcopy(model).text_decoder)
    assert "_fused_ignore_ce" not in model.text_decoder.__dict__


def test_options_that_no_loss_took_are_an_error():
    model = bert("BertForSequenceClassification", num_labels=1)  # a regression
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.rand(2)}
    assert patch_model(model)(**inputs).loss.isfinite()
    patch_model(model, label_smoothing=0.1)
    with pytest.raises(RuntimeError, match="label_smoothing.*BertForSequenceClassification"):
        model(**inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smothing": 0.1}, TypeError, "did you mean 'label_smoothing'"),
        ({"reduction": "sum"}, TypeError, "reduction"),
        ({"label_smoothing": 2.0}, RuntimeError, "label_smoothing"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"ignore_index": "pad"}, TypeError, "ignore_index"),
        ({"ignore_index": []}, ValueError, "ignore_index"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget"),
        ({"memory_budget": -1}, ValueError, "memory_budget: expected at least 0 bytes, got -1"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"weight": [1.0]}, TypeError, "weight"),
    ],
)
def test_wrong_options_are_errors_at_once(options, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        patch_model(model, **options)
    assert type(model) is transformers.LlamaForCausalLM
    with pytest.raises(error, match=message):
        patch_transformers(**options)
    assert forward.process_wide.settings is None


def test_a_head_whose_weights_are_there_during_its_calls_only():
    """DeepSpeed's ZeRO-3 takes the weights away after every call of a module, and brings them back before."""
    model, inputs = llama(), batch()
    plain = step(model, **inputs)
    head, whole = model.lm_head, model.lm_head.weight.data
    empty = torch.empty(0)
    head.weight.data = empty
    head.register_forward_pre_hook(lambda *_: setattr(head.weight, "data", whole))
    head.register_forward_hook(lambda *_: setattr(head.weight, "data", empty))
    patch_model(model)
    model.zero_grad()
    outputs = model(**inputs)
    head.weight.data = whole  # as before backward
    (outputs.loss * 0.5).backward()
    assert_same_step((outputs, {name: p.grad for name, p in model.named_parameters()}), plain)


@pytest.mark.parametrize("outside", [False, True], ids=["in the forward", "after it"])
def test_zero_if_all_ignored(outside):
    inputs = batch()
    labels = torch.full_like(inputs["labels"], -100)
    losses = []
    for options in ({}, {"zero_if_all_ignored": True}):
        model = patch_model(llama(), without_labels=outside, **options).train()
        if outside:
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
            losses.append(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].flatten()))
        else:
            losses.append(model(input_ids=inputs["input_ids"], labels=labels).loss)
    assert losses[0].isnan()
    assert losses[1] == 0
    losses[1].backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("build", [llama, with_head(lambda: QuantizedHead(D, V, bias=False))], ids=["linear", "logits"])
def test_zero_if_all_ignored_with_a_divisor_of_zero(build, compiled, count):
    """transformers divides the sum by it afterwards."""
    torch._dynamo.reset()
    model, inputs = patch_model(build(), zero_if_all_ignored=True), batch()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    loss = forward(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}, num_items_in_batch=count).loss
    assert loss == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert forward(**inputs, num_items_in_batch=count).loss.isinf()  # as of the unpatched model
    assert count == 0
    five = type(count)(5) if not isinstance(count, torch.Tensor) else count + 5
    plain = build()(**inputs, num_items_in_batch=five).loss
    torch.testing.assert_close(forward(**inputs, num_items_in_batch=five).loss, plain)


def test_zero_if_all_ignored_leaves_other_losses_alone():
    """The option changes only the mean of no tokens, so it is no error where other losses are taken."""
    model = patch_model(llama(), without_labels=True, zero_if_all_ignored=True).train()
    ids = batch()["input_ids"]
    log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    (-log_probs.mean()).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_a_budget_may_be_a_string():
    """The budget also works where logits are reduced tile by tile."""
    model = patch_model(llama(), without_labels=True, memory_budget="1 MiB").train()
    plain = llama().train()
    ids = batch()["input_ids"]
    for reduced in (
        lambda x: x.logsumexp(-1),
        lambda x: F.cross_entropy(x.flatten(0, 1), ids.flatten()),
    ):
        torch.testing.assert_close(reduced(model(ids).logits), reduced(plain(ids).logits))
