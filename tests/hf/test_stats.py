"""What a patched model returns beside the loss: statistics, and logits, whose copies stay valid after a step."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import LossStats, fused_cross_entropy
from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import V, batches, llama


def expected(batch, **options):
    """What the statistics should be, from the logits of the unpatched model."""
    logits = llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return fused_cross_entropy(logits.view(-1, V), shifted.reshape(-1), return_stats=True, **options)[1]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("count", [None, 20])
def test_statistics_are_on_the_outputs(grad, count):
    batch = batches(1)[0]
    model = patch_model(llama(), return_stats=True)
    with torch.set_grad_enabled(grad):
        outputs = model(**batch, num_items_in_batch=count)
    stats, true = outputs.loss_stats, expected(batch)
    assert isinstance(stats, LossStats)
    for mine, theirs in zip(stats, true, strict=True):
        torch.testing.assert_close(mine.reshape(theirs.shape), theirs.detach())
        assert not mine.requires_grad
    assert not outputs.logits.is_materialized
    assert "loss_stats" not in outputs  # a trainer gathers the values of the outputs as if they were logits
    assert stats.num_tokens == (batch["labels"][:, 1:] != -100).sum()
    if grad:
        outputs.loss.backward()
        plain = llama()
        plain(**batch, num_items_in_batch=count).loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_statistics_have_the_options():
    batch = batches(1)[0]
    model = patch_model(llama(), return_stats=True, ignore_index=[5, 9], softcap=2.0)
    stats = model(**batch).loss_stats
    assert torch.equal(stats.entropy.flatten() == 0, expected(batch, ignore_index=[-100, 5, 9]).entropy == 0)
    torch.testing.assert_close(
        stats.lse.flatten(), expected(batch, ignore_index=[-100, 5, 9], softcap=2.0).lse.detach()
    )


def test_they_come_when_they_were_asked_for():
    batch = batches(1)[0]
    assert not hasattr(patch_model(llama())(**batch), "loss_stats")
    model = patch_model(llama(), return_stats=True)
    with pytest.raises(ValueError, match="return_dict=True"):
        model(**batch, return_dict=False)
    with pytest.raises(TypeError, match="return_stats: expected True or False"):
        patch_model(model, return_stats="yes")


@pytest.mark.parametrize(
    "snapshot",
    [
        lambda logits: logits.detach().clone(),
        lambda logits: logits[:, -1].float().detach().clone(),
        lambda logits: logits.detach().softmax(-1).clone(),
    ],
)
def test_a_clone_of_detached_logits_lasts(snapshot):
    batch, model = batches(1)[0], patch_model(llama())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    outputs = model(**batch)
    outputs.loss.backward()
    kept = snapshot(outputs.logits)
    optimizer.step()
    torch.testing.assert_close(kept, snapshot(llama()(**batch).logits))
    with pytest.raises(RuntimeError, match=r"keep outputs.logits.detach\(\).clone\(\)"):
        outputs.logits.detach()[:, :2].cumsum(0)
    assert next(iter(fusion_report(model).reads)).startswith("clone (test_stats.py:")
