"""TRL's trainers that distil, patched and stock: the same losses, metrics and parameters; the divergence is ours."""

import pytest
import torch

from fused_ignore_ce.hf import fusion_report
from fused_ignore_ce.trl import patch_trainer, unpatch_trainer
from fused_ignore_ce.trl.distillation import KIND, _Divergence, _divergence, _running

from ..helpers.trl_runs import assert_same_runs, trainer_of

module = pytest.importorskip("trl.trainer.distillation_trainer")

#: TRL uses names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

STEPS = 6
CASES = {
    "distillation, reverse": ("distillation", {"beta": 1.0, "temperature": 0.7}),
    "distillation, mixed, accumulation": ("distillation", {"beta": 0.3, "gradient_accumulation_steps": 2}),
    "distillation, LoRA": ("distillation", {"beta": 0.0, "lora": True, "learning_rate": 0.3}),
    "GKD": ("GKD", {"beta": 0.3}),
    "GKD, forward, accumulation": ("GKD", {"beta": 0.0, "gradient_accumulation_steps": 2}),
}


def prepared(name, folder, **settings):
    trainer = trainer_of(name, folder, **{"max_steps": STEPS, **settings})
    trainer.initial = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_same_as_stock(case, tmp_path, monkeypatch):
    name, settings = CASES[case]
    stock = prepared(name, tmp_path, **settings)
    stock.train()
    own = module._chunked_divergence_loss
    trainer = patch_trainer(prepared(name, tmp_path, **settings))
    if name == "distillation":  # any later call of TRL's own function is an error
        monkeypatch.setattr(module.ChunkedDivergenceFunction, "forward", None)
    else:
        monkeypatch.setattr(type(trainer), "generalized_jsd_loss", None)
    trainer.train()
    assert_same_runs(trainer, stock)
    report = fusion_report(trainer.model)
    assert set(report.fused) == {KIND}
    assert report.fused[KIND].calls == STEPS * settings.get("gradient_accumulation_steps", 1)
    assert 0 < report.fused[KIND].ignored < report.fused[KIND].tokens
    unpatch_trainer(trainer)
    assert module._chunked_divergence_loss is own
    assert not {"_compute_loss", "generalized_jsd_loss"} & set(trainer.__dict__)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_every_argument_of_the_loss(beta, monkeypatch):
    """Biases, scales, caps, a temperature and a mask; with a divisor and without one."""
    torch.manual_seed(0)
    h, th, w, tw = torch.randn(2, 7, 5), torch.randn(2, 7, 6), torch.randn(11, 5), torch.randn(11, 6)
    b, tb = torch.randn(11), torch.randn(11)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0]])
    leaves = [t.requires_grad_() for t in (h, w, b)]
    monkeypatch.setattr(_running, "trainer", "one")
    monkeypatch.setattr(_running, "options", {"memory_budget": None, "backend": "torch"})
    monkeypatch.setattr("fused_ignore_ce.trl.distillation._tell", lambda *_: None)
    for divisor in (None, torch.tensor(9)):
        given = (h, th, w, tw, mask, beta, divisor, b, tb, 1.3, 0.6, 2.0, 4.0, 0.7)
        results = []
        for function in (_Divergence(module._chunked_divergence_loss), module._chunked_divergence_loss):
            loss, entropy, count = function(*given)
            results.append([loss, entropy.detach(), count, *torch.autograd.grad(loss, leaves)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_reductions_of_gkd(tmp_path):
    trainer = prepared("GKD", tmp_path)
    own, given = trainer.generalized_jsd_loss, (torch.randn(2, 5, 9), torch.randn(2, 5, 9))
    labels = torch.tensor([[-100, 1, 2, 3, -100], [-100] * 5])
    for options in (
        {"labels": labels}, {"labels": labels, "num_items_in_batch": 4, "temperature": 2.0}, {},
        {"reduction": "sum", "beta": 0.0}, {"labels": labels, "reduction": "mean"},
        {"labels": torch.full((2, 5), -100)},
    ):  # fmt: skip
        expected = own(*given, **options)
        found = patch_trainer(trainer).generalized_jsd_loss(*given, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        unpatch_trainer(trainer)


def test_betas():
    assert _divergence(1.0) == {"divergence": "reverse_kl"}
    assert _divergence(0) == {"divergence": "forward_kl"}
    assert _divergence(0.5) == {"divergence": "jsd", "beta": 0.5}


def test_logits_that_are_rounded_already_are_refused(tmp_path):
    trainer = prepared("GKD", tmp_path)
    with pytest.raises(ValueError, match="logits_dtype: expected None for a GKDTrainer"):
        patch_trainer(trainer, logits_dtype=torch.float32)
