"""PEFT on a patched model: adapters on the body and the head, the head trained whole, some of its tokens trained."""

import pytest
import torch

from fused_ignore_ce.hf import fusion_report, patch_model, unpatch_model

from ..helpers.hf_worker import PAD, V, assert_deferred, assert_same, batches, llama, spied, trajectory

peft = pytest.importorskip("peft")

#: PEFT uses names that transformers has deprecated, and warns of the configurations below.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")

STEPS = 5
BODY, HEAD = ["q_proj", "v_proj", "down_proj"], ["q_proj", "lm_head"]
CONFIGS = {
    "body": {"target_modules": BODY},
    "head": {"target_modules": HEAD},
    "head, rank-stabilised": {"target_modules": HEAD, "use_rslora": True, "lora_alpha": 3},
    "head, LoRA's bias": {"target_modules": HEAD, "lora_bias": True},
    "head, dropout": {"target_modules": HEAD, "lora_dropout": 0.3},
    "head, DoRA": {"target_modules": HEAD, "use_dora": True},
    "head saved whole": {"target_modules": BODY, "modules_to_save": ["lm_head"]},
    "head and embeddings saved whole": {"target_modules": BODY, "modules_to_save": ["lm_head", "embed_tokens"]},
}
_TIED, _TOKENS = {"tie_word_embeddings": True}, {"lm_head": [5, 9], "embed_tokens": [5, 9]}
#: name -> (configuration of Llama, of its adapters)
MORE = {
    "tied, DoRA": (_TIED, {"target_modules": HEAD, "use_dora": True}),
    "tied, LoRA on both": (_TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, embeddings saved": (
        _TIED, {"target_modules": BODY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "tied, head saved": (_TIED, {"target_modules": BODY, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tied, both saved": (_TIED, {"target_modules": BODY, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ({}, {"target_modules": BODY, "trainable_token_indices": [5, 9, 11]}),
    "tokens of both": ({}, {"target_modules": BODY, "trainable_token_indices": _TOKENS}),
    "tied, tokens": (_TIED, {"target_modules": BODY, "trainable_token_indices": [5, 9, 11]}),
    "tied, tokens of both": (
        _TIED, {"target_modules": BODY, "trainable_token_indices": _TOKENS, "ensure_weight_tying": True}
    ),
    "IA3": ({}, {"cls": "IA3Config", "target_modules": HEAD, "feedforward_modules": []}),
    "IA3, feedforward": ({}, {"cls": "IA3Config", "target_modules": HEAD, "feedforward_modules": ["lm_head"]}),
    "VeRA": ({}, {"cls": "VeraConfig", "target_modules": ["lm_head"]}),
    "OFT": ({}, {"cls": "OFTConfig", "target_modules": HEAD, "oft_block_size": 4}),
}  # fmt: skip


def lora(patch=None, model=None, options=None, cls="LoraConfig", **config):
    """LoRA whose second matrix is not zero, so that the first step has gradients for both matrices."""
    model = model or llama()
    if patch == "before":
        patch_model(model, **options or {})
    torch.manual_seed(3)
    if cls == "LoraConfig":
        config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | config
    wrapped = peft.get_peft_model(model, getattr(peft, cls)(task_type="CAUSAL_LM", **config))
    torch.manual_seed(5)
    for name, p in wrapped.named_parameters():  # not the identity, in which they begin
        if p.requires_grad and ("ia3_l" in name or "magnitude" in name):
            p.data *= 1 + 0.2 * torch.rand_like(p)
    return patch_model(wrapped, **options or {}) if patch == "after" else wrapped


def train(model, lr=0.05):
    torch.manual_seed(4)  # dropout
    return trajectory(model, batches(STEPS), lr=lr)


def assert_trains_the_same(plain, model, spy, lr=0.05):
    losses, outputs = train(model, lr)
    calls, spy.calls = spy.calls, 0
    assert calls == STEPS
    assert_deferred(outputs)
    expected, _ = train(plain, lr)
    assert_same(losses, expected)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("patch", ["before", "after"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lora(config, patch, monkeypatch):
    assert_trains_the_same(lora(**config), lora(patch, **config), spied(monkeypatch))


@pytest.mark.parametrize("patch", ["before", "after"])
@pytest.mark.parametrize(("of_model", "config"), MORE.values(), ids=MORE)
def test_other_adapters(of_model, config, patch, monkeypatch):
    plain, model = (lora(p, llama(initializer_range=0.1, **of_model), **config) for p in (None, patch))
    assert_trains_the_same(plain, model, spied(monkeypatch), lr=0.3)


@pytest.mark.parametrize(
    ("of_model", "config"),
    [
        ({}, CONFIGS["head"]),
        ({}, CONFIGS["head, DoRA"]),
        *(MORE[n] for n in ("tied, head saved", "tied, tokens", "IA3")),
    ],
    ids=["LoRA", "DoRA", "saved", "tokens", "IA3"],
)
def test_options_reach_the_loss(of_model, config, monkeypatch):
    plain = lora(None, llama(**of_model), **config)
    batch = batches(1)[0]
    logits, labels = plain(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    spy = spied(monkeypatch)
    found = lora("before", llama(**of_model), {"label_smoothing": 0.1}, **config)(**batch).loss
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    assert spy.calls == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("patch", ["before", "after"])
@pytest.mark.parametrize("config", [CONFIGS["head"], CONFIGS["head saved whole"]], ids=["head", "saved"])
def test_gradients(config, patch, autocast, monkeypatch):
    """Compares the first step's gradients of all trained parameters."""

    def grads(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batches(1)[0]).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = grads(lora(**config))
    spy = spied(monkeypatch)
    ours = grads(lora(patch, **config))
    assert spy.calls == 1
    assert ours.keys() == expected.keys()
    assert any("lm_head" in name for name in ours)
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        assert scale > 0, name
        assert (ours[name] - grad).abs().max() <= (3e-2 if autocast else 1e-5) * scale, name


@pytest.mark.parametrize("patch", ["before", "after"])
@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name != "head, LoRA's bias"]
)  # PEFT merges it only where there is a bias
def test_merged(name, patch, monkeypatch):
    config = CONFIGS[name]
    plain, model = lora(**config), lora(patch, **config)
    train(plain)
    train(model)
    plain, model = plain.merge_and_unload(), model.merge_and_unload()
    for p in (*plain.parameters(), *model.parameters()):
        p.requires_grad_(True)
    expected, _ = train(plain, lr=0.3)
    spy = spied(monkeypatch)
    losses, outputs = train(model, lr=0.3)
    assert_same(losses, expected, rel=1e-4)  # after twice as many steps
    assert_deferred(outputs)
    assert spy.calls == STEPS
    assert not fusion_report(model).not_fused
    assert type(unpatch_model(model)) is type(plain)
    assert type(model.train()(batches(1)[0]["input_ids"]).logits) is torch.Tensor


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapter_is_saved_and_loaded(config, tmp_path, monkeypatch):
    model = lora("before", **config)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    again = peft.PeftModel.from_pretrained(patch_model(llama()), tmp_path, is_trainable=True)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(loaded.eval()(ids).logits, expected)
        assert torch.equal(again.eval()(ids).logits, expected)
    expected, _ = train(loaded)
    losses, outputs = train(again)
    assert_same(losses, expected)
    assert_deferred(outputs)


def test_adapter_is_disabled_and_switched(monkeypatch):
    plain, model = lora(**CONFIGS["head"]), lora("after", **CONFIGS["head"])
    batch = batches(1)[0]
    for m in (plain, model):
        torch.manual_seed(5)
        m.add_adapter("other", peft.LoraConfig(r=2, target_modules=HEAD, init_lora_weights=False))
    spy = spied(monkeypatch)
    losses = []
    for m in (plain, model):
        with m.disable_adapter():
            losses.append([m(**batch).loss.item()])
        losses[-1].append(m(**batch).loss.item())
        m.set_adapter("other")
        losses[-1].append(m(**batch).loss.item())
        m.base_model.set_adapter(["default", "other"])  # two products beside the head's
        losses[-1].append(m(**batch).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 4
    assert spy.calls == 4


def test_tied_embeddings_with_lora_on_them(monkeypatch):
    config = {"target_modules": ["q_proj", "embed_tokens"]}
    expected, _ = train(lora(model=llama(tie_word_embeddings=True), **config))
    spy = spied(monkeypatch)
    losses, outputs = train(lora("before", model=llama(tie_word_embeddings=True), **config))
    assert_same(losses, expected)
    assert_deferred(outputs)
    assert spy.calls == STEPS


def test_prompt_tuning(monkeypatch):
    """PEFT puts virtual tokens in front, and lengthens the labels to match."""

    def tuned(patched):
        model = llama()
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        return patch_model(wrapped) if patched else wrapped

    expected, _ = train(tuned(False), lr=3.0)
    spy = spied(monkeypatch)
    losses, outputs = train(tuned(True), lr=3.0)
    assert_same(losses, expected)
    assert_deferred(outputs)
    assert spy.calls == STEPS


@pytest.mark.parametrize("patch", ["before", "after"])
def test_ignored_ids_reach_the_loss(patch):
    model = llama()
    batch = batches(1)[0]
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, PAD)
    wrapped = peft.get_peft_model(
        patch_model(model, ignore_index=[PAD]) if patch == "before" else model,
        peft.LoraConfig(r=4, target_modules=HEAD),
    )
    if patch == "after":
        patch_model(wrapped, ignore_index=PAD)
    expected = llama()(**batches(1)[0]).loss
    torch.testing.assert_close(wrapped(**batch).loss, expected)
    assert batch["labels"].max() < V
