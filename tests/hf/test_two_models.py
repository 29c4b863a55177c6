"""A patched student and a patched teacher whose logits meet in a divergence: fused, with the same gradients."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import examples, llama

BATCH = {name: torch.stack([example[name] for example in examples(4)]) for name in ("input_ids", "attention_mask")}


def written_out(student, teacher):
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def by_function(student, teacher):
    log_q, log_p = F.log_softmax(student / 2.0, dim=-1), F.log_softmax(teacher / 2.0, dim=-1)
    return F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), reduction="batchmean", log_target=True) * 4.0


def of_probabilities(student, teacher):
    return torch.nn.KLDivLoss(reduction="sum")(student.log_softmax(-1), teacher.softmax(-1)) / 7


def reverse(student, teacher):
    return F.kl_div(teacher.log_softmax(-1), student.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()


DIVERGENCES = (written_out, by_function, of_probabilities, reverse)


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda f: f.__name__)
def test_a_divergence_of_two_models_is_fused(divergence, frozen):
    """The student's logits are not computed. Nor are those of a teacher that is frozen; under no_grad, models run as
    they are, and the teacher's logits exist."""
    results = []
    for patched in (False, True):
        student, teacher = llama(), llama(seed=1, hidden_size=32).requires_grad_(False)
        if patched:
            patch_model(student)
            patch_model(teacher)
        with torch.set_grad_enabled(frozen):
            theirs = teacher(**BATCH).logits
        loss = divergence(student(**BATCH).logits, theirs)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in student.parameters())])
        if patched:
            report = fusion_report(student)
            assert report.fused
            assert not report.reads
            assert not fusion_report(teacher).reads
            assert report.bytes_not_allocated > 0
    for mine, plain in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_a_mean_over_all_elements_reads_the_logits():
    student, (x, y) = patch_model(llama()), torch.randn(2, 4, 14, 101)
    loss = F.kl_div(student(**BATCH).logits.log_softmax(-1), x.softmax(-1) + 0 * y, reduction="none").mean()
    loss.backward()
    assert fusion_report(student).reads
