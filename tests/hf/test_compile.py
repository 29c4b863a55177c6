"""torch.compile of a patched model: the linear loss is in the graph, logits are not, losses are as in eager mode."""

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import Trainer, TrainingArguments

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import fusion_report, patch_model, unpatch_model

from ..helpers.hf_worker import assert_deferred, assert_same, batches, examples, llama, trajectory

STEPS = 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Backend:
    """The backend aot_eager, which counts graphs and the losses in them."""

    def __init__(self):
        self.graphs = self.linear = self.plain = 0

    def __call__(self, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        self.graphs += 1
        self.linear += sum("linear_cross_entropy" in target for target in targets)
        self.plain += sum("cross_entropy" in target and "linear" not in target for target in targets)
        return lookup_backend("aot_eager")(graph, inputs)


def small():
    return llama(num_hidden_layers=1)


def test_compiled_and_then_patched():
    expected, _ = trajectory(small(), batches(STEPS))
    backend = Backend()
    model = patch_model(torch.compile(small(), backend=backend))
    losses, outputs = trajectory(model, batches(STEPS))
    assert_same(losses, expected)
    assert_deferred(outputs)
    assert (backend.graphs, backend.linear, backend.plain) == (1, 1, 0)
    with pytest.raises(RuntimeError, match="changed in place"):
        outputs.logits.sum()  # the weights have changed since


def test_statistics_and_the_report():
    """Statistics equal those of eager mode. The forward is one graph, and what follows it is not compiled."""
    batch, model = batches(1)[0], patch_model(small(), return_stats=True)
    expected, backend = model(**batch), Backend()
    patch_model(model, return_stats=True)
    outputs = torch.compile(model, backend=backend)(**batch)
    for ours, true in zip(outputs.loss_stats, expected.loss_stats, strict=True):
        torch.testing.assert_close(ours, true)
    assert (backend.graphs, backend.linear) == (1, 1)
    report = fusion_report(model)
    assert [*report.fused] == ["cross_entropy (compiled)"]
    assert "tokens, ignored ones not counted" in str(report)
    assert report.bytes_not_allocated == outputs.logits.numel() * 4
    assert report.reads == {}
    assert [str(break_) for break_ in torch._dynamo.utils.counters["graph_break"] if "disable" not in str(break_)] == []


def test_patched_and_then_compiled_with_options():
    batch = batches(1)[0]
    batch["labels"][0, -1] = 5
    options = {"ignore_index": 5, "label_smoothing": 0.1, "z_loss": 0.01}
    model = patch_model(small(), **options)
    expected = model(**batch).loss
    plain = small()(**batch)
    assert (expected - plain.loss).abs() > 1e-3
    compiled = torch.compile(model, backend="aot_eager")
    outputs = compiled(**batch)
    torch.testing.assert_close(outputs.loss, expected)
    assert not outputs.logits.is_materialized
    torch.testing.assert_close(outputs.logits + 0, plain.logits)
    assert outputs.logits.is_materialized
    outputs.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    unpatch_model(model)
    outputs = compiled(**batch)
    assert not isinstance(outputs.logits, DeferredLogits)
    torch.testing.assert_close(outputs.loss, plain.loss)


@pytest.mark.parametrize("autocast", [False, True], ids=["model.compile", "a function, bf16"])
def test_other_ways_to_compile(autocast):
    batch = batches(1)[0]

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**batch).loss

    plain, model, backend = small(), patch_model(small()), Backend()
    expected = loss(plain)
    if autocast:
        ours = torch.compile(loss, backend=backend)(model)
    else:
        model.compile(backend=backend)
        ours = loss(model)
    torch.testing.assert_close(ours, expected, rtol=2e-2 if autocast else 1e-5, atol=0)
    assert (backend.linear, backend.plain) == (1, 0)
    expected.backward()
    ours.backward()
    scale = plain.lm_head.weight.grad.abs().max()
    difference = (model.lm_head.weight.grad - plain.lm_head.weight.grad).abs().max()
    assert difference <= scale * (3e-2 if autocast else 1e-5)


def test_trainer(tmp_path):
    """Compares a patched and compiled model with a plain one."""
    pytest.importorskip("accelerate")

    def losses(model, **compiled):
        seen = []

        class Recorder(Trainer):
            def training_step(self, *args, **kwargs):
                seen.append(super().training_step(*args, **kwargs).item())
                return torch.tensor(seen[-1])

        settings = {"output_dir": str(tmp_path), "max_steps": STEPS, "learning_rate": 0.3, "optim": "sgd",
                    "per_device_train_batch_size": 3, "save_strategy": "no", "report_to": "none", "use_cpu": True,
                    "disable_tqdm": True, **compiled}  # fmt: skip
        Recorder(model=model, args=TrainingArguments(**settings), train_dataset=examples(9)).train()
        return seen

    compiled = losses(patch_model(small()), torch_compile=True, torch_compile_backend="aot_eager")
    assert_same(compiled, losses(small()))
