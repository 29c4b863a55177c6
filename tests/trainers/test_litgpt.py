"""docs/guides/trainers/litgpt.md, with LitGPT's own recipe: `make test-trainers` installs it."""

import importlib

import pytest
import torch

from fused_ignore_ce import defer_logits
from fused_ignore_ce.hf import fusion_report

from ..helpers.snippets import names_of
from .training import IDS, LABELS, V, gradients

litgpt = pytest.importorskip("litgpt", reason="make test-trainers installs LitGPT")
chunked_cross_entropy = pytest.importorskip("litgpt.utils").chunked_cross_entropy


@pytest.fixture
def page(monkeypatch):
    """The names that the page defines. What it replaces in LitGPT is put back afterwards."""
    import litgpt.finetune.full
    import litgpt.pretrain

    monkeypatch.setattr(litgpt.finetune.full, "GPT", litgpt.GPT)
    monkeypatch.setattr(litgpt.pretrain, "chunked_cross_entropy", litgpt.pretrain.chunked_cross_entropy)
    return names_of("guides/trainers/litgpt.md")


def small(cls):
    torch.manual_seed(0)
    config = litgpt.Config.from_name("pythia-14m", n_layer=2, n_embd=32, n_head=4, padded_vocab_size=V)
    return cls(config)


def fit(model, monkeypatch, tmp_path):
    """Three steps of the recipe; a tokenizer and validation are left out."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import full

    monkeypatch.setattr(full, "Tokenizer", lambda _: None)
    monkeypatch.setattr(full, "validate", lambda *_, **__: torch.tensor(0.0))
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    counts = dict.fromkeys(("raw", "raw_plus_prompt_template"), torch.tensor(16))
    rows = [
        {"input_ids": ids, "labels": labels, "token_counts": counts} for ids, labels in zip(IDS, LABELS, strict=True)
    ]
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(rows))
    full.fit(
        fabric,
        {"model": model, "optimizer": optimizer, "scheduler": scheduler, "iter_num": 0, "step_count": 0},
        loader,
        loader,
        devices=1,
        resume=False,
        checkpoint_dir=tmp_path,
        out_dir=tmp_path,
        train=TrainArgs(
            global_batch_size=1, micro_batch_size=1, max_steps=3, epochs=9, log_interval=9, save_interval=None
        ),
        eval=EvalArgs(interval=9, max_iters=1),
        data=None,
    )
    return dict(model.named_parameters())


def test_fine_tuning(monkeypatch, tmp_path):
    import litgpt.finetune.full as full

    expected = fit(small(full.GPT), monkeypatch, tmp_path)
    monkeypatch.setattr(full, "GPT", full.GPT)
    names_of("guides/trainers/litgpt.md")
    model = small(full.GPT)
    torch.testing.assert_close(fit(model, monkeypatch, tmp_path), expected)
    report = fusion_report(model.lm_head)
    assert sum(kind.calls for kind in report.fused.values()) == 3, report
    assert not report.reads, report


@pytest.mark.parametrize("kind", ["lora", "adapter", "adapter_v2"])
def test_models_with_lora_and_adapters(kind):
    """Their recipes call the head on parts of the sequence."""
    module = importlib.import_module(f"litgpt.{kind}")
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": V}
    lora = {"lora_r": 2, "lora_query": True} if kind == "lora" else {}
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = module.GPT(module.Config.from_name("pythia-14m", **sizes, **lora))
        head = model.lm_head if kind == "adapter" else model.lm_head.linear
        if fused:
            defer_logits(head)
        found.append(gradients(model, chunked_cross_entropy(model(IDS, lm_head_chunk_size=8), LABELS)))
    torch.testing.assert_close(*found)
    report = fusion_report(head)
    assert report.fused, report
    assert not report.reads, report


def test_the_loss_of_pretraining(page):
    import litgpt.pretrain

    replaced = litgpt.pretrain.chunked_cross_entropy
    assert replaced is page["chunked_cross_entropy"]
    model = small(litgpt.GPT)
    for labels in (LABELS, torch.full_like(LABELS, -100)):
        expected = gradients(model, chunked_cross_entropy(model(IDS), labels))
        torch.testing.assert_close(gradients(model, replaced(model(IDS), labels)), expected)
