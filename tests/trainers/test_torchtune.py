"""docs/guides/trainers/torchtune.md, with torchtune's own recipe: `make test-trainers` installs it."""

import contextlib
import importlib.util
import types

import pytest
import torch

from fused_ignore_ce import FusedCrossEntropyLoss
from fused_ignore_ce.hf import fusion_report

from ..helpers.snippets import names_of
from .training import IDS, LABELS, V, gradients

torchtune = pytest.importorskip("torchtune", reason="make test-trainers installs torchtune")


@pytest.fixture
def builders(monkeypatch):
    """torchtune's builder of Llama 3.1, with small sizes, and that of the page."""
    from torchtune.models import llama3_1

    def small(**options):
        torch.manual_seed(0)
        return llama3_1.llama3_1(V, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, **options)

    monkeypatch.setattr(llama3_1, "llama3_1_8b", small)
    return small, names_of("guides/trainers/torchtune.md")["llama3_1_8b"]


def loss_step(model, loss_fn):
    """What the recipe for full fine-tuning computes; `recipes` is a folder that refuses to be imported."""
    (folder,) = importlib.util.find_spec("torchtune").submodule_search_locations
    path = f"{folder}/../recipes/full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("full_finetune_single_device", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if loss_fn.__class__.__name__ == "CEWithChunkedOutputLoss":
        model.set_num_output_chunks(loss_fn.num_output_chunks)
    state = types.SimpleNamespace(
        _model=model, _loss_fn=loss_fn, activations_handling_ctx=contextlib.nullcontext(),
        ignore_labels_cache=torch.full((len(LABELS), 1), loss_fn.ignore_index),
    )  # fmt: skip
    return recipe.FullFinetuneRecipeSingleDevice._loss_step(state, {"tokens": IDS, "labels": LABELS})


@pytest.mark.parametrize("kind", ["plain", "compiled", "chunked"])
def test_a_model_with_deferred_logits(builders, kind):
    plain, fused = (build() for build in builders)
    expected = gradients(plain, loss_step(plain, torch.nn.CrossEntropyLoss()))
    loss_fn = torch.nn.CrossEntropyLoss()
    if kind == "compiled":
        torchtune.training.compile_loss(loss_fn)
    elif kind == "chunked":
        loss_fn = torchtune.modules.loss.CEWithChunkedOutputLoss()
    torch.testing.assert_close(gradients(fused, loss_step(fused, loss_fn)), expected)
    report = fusion_report(fused.output)
    assert not report.reads, report
    assert sum(kind.calls for kind in report.fused.values()) == (8 if kind == "chunked" else 1)


def test_a_tied_head():
    """It is no module; the page says to take the loss of logits."""
    from torchtune.models.llama3_2 import llama3_2

    from fused_ignore_ce import defer_logits

    torch.manual_seed(0)
    model = llama3_2(V, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64)
    with pytest.raises(TypeError, match="head: expected a module, got TiedLinear"):
        defer_logits(model.output)
    expected = gradients(model, loss_step(model, torch.nn.CrossEntropyLoss()))
    torch.testing.assert_close(gradients(model, loss_step(model, FusedCrossEntropyLoss())), expected)
