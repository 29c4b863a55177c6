"""`patch_model(model, without_labels=True)`: a loss that is taken after the forward is fused, whoever takes it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from fused_ignore_ce import FusedCrossEntropyLoss, fused_causal_lm_loss, fused_cross_entropy
from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import fusion_report, patch_model, patch_transformers

from ..helpers.hf_worker import PAD, T, V, assert_same, batches, llama

STEPS, LR = 4, 0.3
FP32, BF16 = 1e-5, 2e-2


def criterion(logits, labels):
    return torch.nn.CrossEntropyLoss()(logits[..., :-1, :].contiguous().view(-1, V), labels[..., 1:].reshape(-1))


def functional(logits, labels):
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:])


def ours(logits, labels):
    return FusedCrossEntropyLoss(ignore_index=[-100])(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def ours_by_row(logits, labels):
    """A loss with statistics and with options that `F.cross_entropy` does not have."""
    options = {"ignore_index": [-100], "reduction": "none", "z_loss": 1e-4, "return_stats": True}
    losses, stats = fused_cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], **options)
    assert losses.shape == stats.correct.shape == labels[:, 1:].shape
    return losses.sum() / stats.num_tokens


def ours_shifted(logits, labels):
    return fused_causal_lm_loss(logits, labels, label_smoothing=0.1)


def masked(logits, labels):
    kept = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept])


def nll(logits, labels):
    return F.nll_loss(F.log_softmax(logits, dim=-1)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def log_probs(logits, labels):
    """Log-probabilities as in preference and policy-gradient training."""
    labels = labels[:, 1:].clone()
    kept = labels != -100
    labels[~kept] = 0
    found = torch.gather(logits[:, :-1].log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return -(found * kept).sum() / kept.sum()


def selective(logits, labels):
    """Log-probabilities by logsumexp, row by row, as TRL computes them in float32, with a temperature."""
    logits, labels = logits[:, :-1] / 0.9, labels[:, 1:].clamp(min=0)
    chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    return -(chosen - torch.stack([torch.logsumexp(x, dim=-1) for x in logits])).mean()


def with_entropy(logits, labels):
    log_probs = F.log_softmax(logits[:, :-1], dim=-1)
    entropy = -(torch.exp(log_probs) * log_probs).sum(-1)
    return nll(logits, labels) - 0.01 * entropy.mean()


def in_chunks(logits, labels):
    losses = [
        F.cross_entropy(rows, target, reduction="sum")
        for rows, target in zip(logits[:, :-1].reshape(-1, V).split(5), labels[:, 1:].reshape(-1).split(5), strict=True)
    ]
    return torch.stack(losses).sum() / (labels[:, 1:] != -100).sum()


def with_z(logits, labels):
    return criterion(logits, labels) + 1e-2 * torch.logsumexp(logits[:, :-1], dim=-1).square().mean()


#: loss of the user's own -> the kinds that its report names
LOSSES = {
    criterion: ["cross_entropy"],
    functional: ["cross_entropy"],
    masked: ["cross_entropy"],
    nll: ["nll_loss(log_softmax)"],
    log_probs: ["gather(log_softmax(logits))"],
    selective: ["gather(logits)", "logsumexp(logits)"],
    with_entropy: ["sum(mul(exp(log_softmax(logits)), log_softmax(logits)))", "nll_loss(log_softmax)"],
    in_chunks: ["cross_entropy"],
    ours: ["fused_cross_entropy"],
    ours_by_row: ["fused_cross_entropy"],
    ours_shifted: ["fused_causal_lm_loss"],
    with_z: ["cross_entropy", "logsumexp(logits)"],
}


def loop(model, loss_of, context=None, data=None):
    """The losses of a user's own loop, which gives the model no labels."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for batch in data or batches(STEPS):
        with context() if context else torch.enable_grad():
            outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"])
            loss = loss_of(outputs.logits, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("context", [None, partial(torch.autocast, "cpu", torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda f: f.__name__)
def test_a_loop_of_ones_own(loss_of, context):
    expected = loop(llama(), loss_of, context)
    model = patch_model(llama(), without_labels=True)
    assert_same(loop(model, loss_of, context), expected, BF16 if context else FP32)
    report = fusion_report(model)
    assert [*report.fused] == LOSSES[loss_of]
    assert report.reads == {}
    size = 2 if context else 4
    assert report.bytes_not_allocated == size * STEPS * 3 * T * V
    for kind in report.fused.values():
        assert kind.calls >= STEPS


def test_a_loss_function_of_ours_in_the_forward_is_fused():
    """`model.loss_function = fused_causal_lm_loss`, and patched later: the options of both reach the loss."""
    expected = patch_model(llama(), label_smoothing=0.1)
    model = llama()
    model.loss_function = fused_causal_lm_loss
    patch_model(model, label_smoothing=0.1)
    for batch in batches(2):
        for one in (expected, model):
            one.zero_grad()
        losses = [one(**batch, num_items_in_batch=11).loss for one in (expected, model)]
        losses[0].backward()
        losses[1].backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        for a, b in zip(expected.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    report = fusion_report(model)
    assert list(report.fused) == ["fused_causal_lm_loss"]
    assert report.reads == {}


def test_a_loss_of_ours_never_misses_the_models_options():
    model = patch_model(llama(), without_labels=True, ignore_index=9)
    batch = batches(1)[0]
    batch["labels"][:, 3] = 9
    logits = model(batch["input_ids"]).logits
    expected = fused_causal_lm_loss(llama()(batch["input_ids"]).logits, batch["labels"], ignore_index=[-100, 9])
    torch.testing.assert_close(fused_causal_lm_loss(logits, batch["labels"]), expected)
    with pytest.raises(ValueError, match="asked for with a normalizer"):
        fused_causal_lm_loss(logits, batch["labels"], num_items_in_batch=20)
    with pytest.raises(ValueError, match="vocab_size: expected the last dimension"):
        fused_causal_lm_loss(logits, batch["labels"], vocab_size=V + 1)


def test_the_report_counts_tokens():
    model = patch_model(llama(), without_labels=True, ignore_index=9)
    data = batches(STEPS)
    for batch in data:
        batch["labels"][1, -5] = 9
    loop(model, criterion, data=data)
    (count,) = fusion_report(model).fused.values()
    labels = torch.cat([batch["labels"][:, 1:].reshape(-1) for batch in data])
    assert (count.calls, count.tokens) == (STEPS, len(labels))
    assert count.ignored == int(((labels == -100) | (labels == 9)).sum())
    text = str(fusion_report(model))
    assert f"fused: cross_entropy: {STEPS} calls, {len(labels)} tokens, {count.ignored} of them ignored" in text
    assert "logits read: never" in text
    patch_model(model)
    assert fusion_report(model).fused == {}
    assert "no loss was taken" in str(fusion_report(model))


def test_the_report_names_what_read_the_logits():
    model = patch_model(llama(), without_labels=True)
    loop(model, lambda logits, labels: logits.cumsum(-1).mean() + criterion(logits, labels))
    report = fusion_report(model)
    (reader,) = report.reads
    assert reader.startswith("cumsum (test_without_labels.py:")
    assert report.reads[reader] == STEPS
    assert f"logits read by {reader}: {STEPS} times" in str(report)
    assert report.bytes_not_allocated == 0
    batch = batches(1)[0]
    other = patch_model(llama())
    outputs = other(**batch)
    assert fusion_report(other).bytes_not_allocated == outputs.logits.numel() * 4
    assert not outputs.logits.is_materialized
    outputs.logits[:, 2:4].cumsum(-1)
    assert outputs.logits.is_materialized
    assert fusion_report(other).bytes_not_allocated == 0


def test_options_travel_with_the_logits():
    data = batches(STEPS, ignored=PAD)
    for batch in data:
        batch["labels"][:, -5] = 5
    replaced = [b | {"labels": b["labels"].masked_fill((b["labels"] == PAD) | (b["labels"] == 5), -100)} for b in data]

    def smoothed(logits, labels):
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], label_smoothing=0.1)

    expected = loop(llama(), smoothed, data=replaced)
    model = patch_model(llama(), without_labels=True, ignore_index=[PAD, 5], label_smoothing=0.1)
    assert_same(loop(model, criterion, data=data), expected)
    with pytest.raises(RuntimeError, match="ignore_index, label_smoothing: given to patch_model, but this loss"):
        loop(model, log_probs, data=data)
    with pytest.raises(ValueError, match="IgnoreTokens"):
        loop(model, in_chunks, data=data)


class Plain(torch.nn.Linear):
    """A head that does not call F.linear."""

    def forward(self, hidden):
        return torch.einsum("btd,vd->btv", hidden, self.weight)


def test_options_and_a_head_that_cannot_be_deferred_are_an_error():
    model = llama()
    model.lm_head = Plain(24, V, bias=False)
    expected = loop(model, criterion)
    model = llama()
    model.lm_head = Plain(24, V, bias=False)
    torch.nn.init.normal_(model.lm_head.weight)
    patch_model(model, without_labels=True, z_loss=0.1)
    with pytest.raises(RuntimeError, match="z_loss: given to patch_model.*its head is no matrix product"):
        loop(model, criterion)
    assert expected


def test_generation_and_forwards_without_gradients_run_the_models_own_code():
    plain, model = llama(), patch_model(llama(), without_labels=True)
    ids = batches(1)[0]["input_ids"]
    assert type(model(ids).logits) is DeferredLogits
    with torch.no_grad():
        assert type(model(ids).logits) is torch.Tensor
        assert type(model.eval()(ids).logits) is torch.Tensor
    model.train()
    assert torch.equal(*(m.generate(ids[:, :4], max_new_tokens=6, do_sample=False) for m in (plain, model)))
    assert type(model.model(ids).last_hidden_state) is torch.Tensor
    assert fusion_report(model).reads == {}


def test_a_model_in_eval_mode_keeps_its_options():
    """`from_pretrained` returns models in eval mode, and a loop of one's own need not change that."""
    batch = batches(1)[0]
    losses = []
    for training in (True, False):
        model = patch_model(llama(), ignore_index=5, without_labels=True).train(training)
        logits = model(batch["input_ids"]).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
        assert fusion_report(model).fused["cross_entropy"].calls == 1
    assert (batch["labels"][:, 1:] == 5).any()
    torch.testing.assert_close(*losses)


def test_patch_transformers():
    expected = loop(llama(), criterion)
    model = llama()
    with patch_transformers(without_labels=True):
        assert_same(loop(model, criterion), expected)
    assert fusion_report(model).fused["cross_entropy"].calls == STEPS
    assert type(model(batches(1)[0]["input_ids"]).logits) is torch.Tensor


def test_logits_to_keep_and_auxiliary_losses():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, output_router_logits=True,
    )  # fmt: skip
    batch = batches(1)[0]
    losses, grads = [], []
    for patch in (lambda m: m, partial(patch_model, without_labels=True)):
        torch.manual_seed(0)
        model = patch(MixtralForCausalLM(config))
        outputs = model(batch["input_ids"], logits_to_keep=6)
        loss = F.cross_entropy(outputs.logits.transpose(1, 2), batch["labels"][:, -6:]) + 0.5 * outputs.aux_loss
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true)
    assert fusion_report(model).fused["cross_entropy"].calls == 1


def test_a_direct_preference_loss():
    """Two forwards of the policy and a reference model without gradients."""
    chosen, rejected = batches(2)

    def preference(model, reference):
        def total(which, batch):
            logits = which(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels, kept = batch["labels"][:, 1:].clamp(min=0), batch["labels"][:, 1:] != -100
            return (logits.log_softmax(-1).gather(2, labels[..., None])[..., 0] * kept).sum(-1)

        with torch.no_grad():
            before = total(reference, chosen) - total(reference, rejected)
        loss = -F.logsigmoid(0.1 * (total(model, chosen) - total(model, rejected) - before)).mean()
        loss.backward()
        return loss.item(), [p.grad for p in model.parameters()]

    model = patch_model(llama(), without_labels=True)
    ours, plain = preference(model, patch_model(llama(seed=1), without_labels=True)), preference(llama(), llama(seed=1))
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    for mine, true in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)
    report = fusion_report(model)
    assert report.fused["gather(log_softmax(logits))"].calls == 2
    assert report.reads == {}


@pytest.mark.parametrize("loss_compiled", [False, True], ids=["model", "model and loss"])
def test_compiled(loss_compiled):
    torch._dynamo.reset()
    expected = loop(llama(num_hidden_layers=1), criterion)
    model = patch_model(llama(num_hidden_layers=1), without_labels=True)
    loss_of = torch.compile(criterion, backend="aot_eager") if loss_compiled else criterion
    ours = loop(torch.compile(model, backend="aot_eager"), loss_of)
    assert_same(ours, expected)
    if not loss_compiled:
        assert fusion_report(model).fused["cross_entropy"].calls == STEPS
        assert fusion_report(model).reads == {}


def test_tied_embeddings_with_a_transposed_weight():
    config = GPT2Config(vocab_size=V, n_embd=24, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    losses = []
    for patch in (lambda m: m, partial(patch_model, without_labels=True)):
        torch.manual_seed(0)
        model = patch(GPT2LMHeadModel(config))
        losses.append(loop(model, functional))
    assert_same(losses[1], losses[0])
    assert fusion_report(model).reads == {}
