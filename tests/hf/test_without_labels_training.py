"""`patch_model(model, without_labels=True)` in a Trainer, and in loops that ignore tokens in several ways."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import V, assert_same, batches, examples, llama

STEPS, LR = 4, 0.3
FP32, BF16 = 1e-5, 2e-2


def train(model, folder, recipe, **given):
    pytest.importorskip("accelerate")
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": LR,
        "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, **recipe,
    }  # fmt: skip
    trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=examples(24), **given)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recipe", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_label_smoothing_of_the_trainer(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe = dict(label_smoothing_factor=0.2, **recipe)
    expected = train(llama(), tmp_path, recipe)
    model = patch_model(llama(), without_labels=True)
    assert_same(train(model, tmp_path, recipe), expected, BF16 if "bf16" in recipe else FP32)
    report = fusion_report(model)
    assert {*report.fused} == {"gather(neg(log_softmax(logits)))", "sum(neg(log_softmax(logits)))"}
    assert report.reads == {}


@pytest.mark.parametrize("recipe", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_loss_function_given_to_the_trainer(recipe, tmp_path):
    def loss_of(outputs, labels, num_items_in_batch):
        return ForCausalLMLoss(outputs.logits, labels, V, num_items_in_batch)

    expected = train(llama(), tmp_path, recipe, compute_loss_func=loss_of)
    model = patch_model(llama(), without_labels=True)
    assert_same(train(model, tmp_path, recipe, compute_loss_func=loss_of), expected)
    assert fusion_report(model).fused["cross_entropy"].calls == STEPS * recipe.get("gradient_accumulation_steps", 1)
    assert fusion_report(model).reads == {}


class OwnForward(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return outputs


SPECIAL = 9


def by_criterion(model, batch, given):
    outputs = model(**(batch if given else {k: v for k, v in batch.items() if k != "labels"}))
    loss = torch.nn.CrossEntropyLoss(ignore_index=SPECIAL)
    return loss(outputs.logits[:, :-1].reshape(-1, V), batch["labels"][:, 1:].reshape(-1))


def by_hand(model, batch):
    labels = batch["labels"].masked_fill(batch["labels"] == SPECIAL, -100)
    return model(**batch | {"labels": labels}).loss


#: How people ignore tokens: the class of the model, and the loss.
WAYS = {
    "a criterion, labels given": (LlamaForCausalLM, partial(by_criterion, given=True)),
    "a criterion, no labels given": (LlamaForCausalLM, partial(by_criterion, given=False)),
    "labels of -100": (LlamaForCausalLM, by_hand),
    "an overridden forward": (OwnForward, by_hand),
}


@pytest.mark.parametrize(("cls", "loss_of"), WAYS.values(), ids=WAYS)
def test_the_ways_to_ignore_tokens(cls, loss_of):
    data = batches(STEPS, ignored=SPECIAL)

    def run(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        losses = []
        for batch in data:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = patch_model(llama(cls=cls), without_labels=True)
    assert_same(run(model), run(llama(cls=cls)))
    report = fusion_report(model)
    shifted = torch.cat([batch["labels"][:, 1:].flatten() for batch in data])
    calls, kept = STEPS, int((shifted != SPECIAL).sum())
    if loss_of is WAYS["a criterion, labels given"][1]:  # the model's own loss, which ignores nothing, is taken as well
        calls, kept = 2 * STEPS, kept + len(shifted)
    count = report.fused["cross_entropy"]
    assert (count.calls, count.tokens - count.ignored) == (calls, kept)
    assert report.reads == {}
