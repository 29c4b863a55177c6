"""`patch_model(model, without_labels=True)` fuses the loss in every way in which people ignore tokens."""

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import MyLlama, V, assert_same, batches, llama

STEPS, LR = 4, 0.3


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
    "an overridden forward": (MyLlama, by_hand),
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
