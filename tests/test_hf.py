"""`patch_model`: whatever the head is, loss and gradients are those of the unpatched model."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ignore_ce.deferred import DeferredLogits, forward, loss, product
from fused_ignore_ce.hf import patch_model, patch_transformers, unpatch_model, unpatch_transformers

transformers = pytest.importorskip("transformers")

V, D = 61, 16
TINY = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(cls=None, **config):
    torch.manual_seed(0)
    return (cls or transformers.LlamaForCausalLM)(transformers.LlamaConfig(**(TINY | config)))


def bert(name, **config):
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**TINY, **config)).eval()  # no dropout


def batch(classes=V, seed=0, shape=(2, 9)):
    g = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, V, shape, generator=g)
    labels = torch.randint(5, classes, shape, generator=g)
    labels[0, :6] = -100
    return {"input_ids": input_ids, "labels": labels}


def step(model, **inputs):
    """Loss, gradients, and the loss's logits."""
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.loss * 0.5).backward()
    return outputs, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(ours, plain):
    outputs, grads = ours
    torch.testing.assert_close(outputs.loss, plain[0].loss)
    assert grads.keys() == plain[1].keys()
    for name, grad in grads.items():
        assert (grad is None) == (plain[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, plain[1][name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def took(monkeypatch):
    """Which losses were taken: "linear" from hidden states, "logits" from logits."""
    taken = []

    def spy(module, name, what):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (taken.append(what), original(*a, **k))[1])

    spy(product, "fused_linear_cross_entropy", "linear")
    spy(loss, "fused_cross_entropy", "logits")
    return taken


class MatmulHead(transformers.LlamaForCausalLM):  # type: ignore[name-defined]  # transformers is not followed
    """The input embedding as projection: no output embedding is called."""

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


class QuantizedHead(nn.Linear):
    """Its product is nobody's F.linear."""

    def forward(self, hidden):
        return torch.einsum("btd,vd->btv", hidden, self.weight.round(decimals=2))


class CriterionInForward(transformers.LlamaForCausalLM):  # type: ignore[name-defined]  # transformers is not followed
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        logits = outputs.logits[:, :-1].permute(0, 2, 1)
        outputs.loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels[:, 1:])
        return outputs


def with_head(head):
    def build():
        model = llama()
        torch.manual_seed(1)
        model.lm_head = head()
        return model

    return build


#: name -> (model, how its loss is taken)
HEADS = {
    "linear": (llama, "linear"),
    "bias": (with_head(lambda: nn.Linear(D, V)), "linear"),
    "tied": (lambda: llama(tie_word_embeddings=True), "linear"),
    "transform": (with_head(TransformHead), "linear"),
    "sequential": (with_head(lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V))), "logits"),  # says no size
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
    if name == "bfloat16":  # the rounding of logits to bfloat16 is left out
        torch.testing.assert_close(ours[0].loss, plain[0].loss, rtol=2e-2, atol=0)
    else:
        assert_same(ours, plain)
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
    assert_same(step(patch_model(model), **inputs), plain)
    assert took == ["linear"]


def test_softcap_and_scale_of_the_model_are_kept(took):
    torch.manual_seed(0)
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**TINY, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0)
    )
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(**TINY, logit_scale=0.25))
    for model in (gemma, cohere):
        plain = step(model, **batch())
        assert_same(step(patch_model(model), **batch()), plain)
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


def test_without_labels_the_original_code_runs(took):
    model = llama()
    input_ids = batch()["input_ids"]
    plain, generated = model(input_ids).logits, model.generate(input_ids, max_new_tokens=3, do_sample=False)
    patch_model(model)
    logits = model(input_ids).logits
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, plain)
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), generated)
    assert took == []


def test_ignore_index_adds_ids_to_the_models_own():
    model, inputs = llama(), batch()
    masked = inputs | {"labels": inputs["labels"].where(~torch.isin(inputs["labels"], torch.tensor([7, 11, 30])), -100)}
    assert (masked["labels"] != inputs["labels"]).any()
    plain = step(model, **masked)
    assert_same(step(patch_model(model, ignore_index=[7, 11, 30]), **inputs), plain)
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
    """Next-sentence prediction has two classes, 0 and 1: no ids to ignore are among them."""
    model = bert("BertForPreTraining")
    inputs = batch() | {"next_sentence_label": torch.tensor([0, 1])}
    masked = inputs | {"labels": inputs["labels"].masked_fill(inputs["labels"] == 7, -100)}
    plain = step(model, **masked)
    assert_same(step(patch_model(model, ignore_index=[0, 1, 7]), **inputs), plain)
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
    assert_same(step(patch_model(model), **inputs), plain)
    assert took == ["linear"]
    labels = inputs["labels"].masked_fill(inputs["labels"] == 9, -100)
    masked = step(unpatch_model(model), **inputs | {"labels": labels})
    assert_same(step(patch_model(model, ignore_index=9), **inputs), masked)
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


def test_what_is_no_transformers_model_is_an_error():
    with pytest.raises(TypeError, match="PreTrainedModel.*Linear"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="PreTrainedModel.*str"):
        patch_model("meta-llama/Llama-3.1-8B")


def test_zero_3_is_an_error_that_says_what_to_do():
    model = llama()
    model.lm_head.weight.ds_id = 0  # what DeepSpeed marks partitioned parameters by
    with pytest.raises(RuntimeError, match="ZeRO-3.*fused_causal_lm_loss"):
        patch_model(model)(**batch())


def test_an_exception_in_the_forward_leaves_nothing_behind():
    model = patch_model(llama())
    before = torch._C._len_torch_function_stack()
    with pytest.raises(IndexError):
        model(input_ids=batch()["input_ids"], labels=torch.full((2, 9), V + 3))
    assert torch._C._len_torch_function_stack() == before
    assert not model.lm_head._forward_pre_hooks
    assert type(F.linear(torch.ones(2, D), model.lm_head.weight)) is torch.Tensor


def test_layers_run_without_a_torch_function_mode():
    """A mode costs a Python call an operation; it begins at the head."""
    model, seen = patch_model(llama()), []
    before = torch._C._len_torch_function_stack()
    layer, head = model.model.layers[0], model.lm_head
    for module in (layer, head):
        module.register_forward_hook(lambda *_: seen.append(torch._C._len_torch_function_stack()))
    model(**batch())
    assert seen == [before, before + 1]


def test_models_of_other_threads_are_not_touched():
    model, other = patch_model(llama()), llama()
    found = []

    def run(*_):
        thread = threading.Thread(target=lambda: found.append(type(other(**batch()).logits)))
        thread.start()
        thread.join()

    model.lm_head.register_forward_hook(run)
    model(**batch())
    assert found == [torch.Tensor]


def test_unpatch_restores_the_model_bit_for_bit():
    model = llama()
    before, cls = dict(model.__dict__), type(model)
    unpatch_model(model)
    patch_model(model)
    patch_model(model, label_smoothing=0.1)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert unpatch_model(unpatch_model(model)) is model
    assert type(model) is cls
    assert model.__dict__ == before


def test_a_forward_set_on_the_instance_is_patched_too_and_restored(took):
    """accelerate and TRL set one."""
    model = llama()
    plain = step(model, **batch())
    original = model.forward

    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    model.forward = forward
    patch_model(model)
    assert_same(step(model, **batch()), plain)
    assert took == ["linear"]
    assert unpatch_model(model).__dict__["forward"] is forward
    del model.forward
    patch_model(model, label_smoothing=0.1)
    model.forward = lambda input_ids, labels: copy.copy(plain[0])
    with pytest.raises(RuntimeError, match="label_smoothing"):  # what takes no cross entropy cannot use the option
        model(**batch())


def test_patch_transformers_reaches_every_model_and_leaves_no_trace(took):
    old, forward = llama(), transformers.LlamaForCausalLM.forward
    define = transformers.PreTrainedModel.__dict__.get("__init_subclass__")
    plain = step(old, **batch())
    with patch_transformers():

        class Later(transformers.LlamaForCausalLM):
            def forward(self, input_ids=None, labels=None):
                return super().forward(input_ids, labels=labels)

        for model in (old, llama(), llama(Later)):
            assert_same(step(model, **batch()), plain)
        assert took == ["linear"] * 3
        with patch_transformers(ignore_index=7):
            labels = batch()["labels"].masked_fill(batch()["labels"] == 7, -100)
            inner = step(old, **batch())
        assert_same(step(old, **batch()), plain)
        torch.testing.assert_close(inner[0].loss, copy.deepcopy(old)(batch()["input_ids"], labels=labels).loss)
    del took[:]
    assert_same(step(old, **batch()), plain)
    assert took == []
    assert transformers.LlamaForCausalLM.forward is forward
    assert transformers.PreTrainedModel.__dict__.get("__init_subclass__") == define
    unpatch_transformers()
    assert transformers.LlamaForCausalLM.forward is forward


def test_patch_transformers_reaches_a_forward_that_a_mixin_defines(took):
    cls = transformers.LlamaForSequenceClassification
    assert "forward" not in cls.__dict__
    model = llama(cls, num_labels=4, pad_token_id=0)
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([3, 1])}
    plain = step(model, **inputs)
    with patch_transformers():
        assert_same(step(model, **inputs), plain)
    assert took == ["logits"]
    assert "forward" not in cls.__dict__


def test_a_models_own_options_come_before_those_of_patch_transformers():
    model, inputs = llama(), batch()
    true = patch_model(model, label_smoothing=0.3)(**inputs).loss
    with patch_transformers(label_smoothing=0.1):
        assert torch.equal(model(**inputs).loss, true)
    assert torch.equal(model(**inputs).loss, true)
