"""TRL's SFTTrainer with a patched model: the model's own loss is fused. Only `patch_trainer` replaces TRL's head."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import patch_model

from ..helpers.hf_worker import V, assert_same, llama, spied
from ..helpers.trl_runs import datasets, texts, tokenizer_of, trl

# TRL 1.16 gives each model a fused head, from which loss and metrics come. Earlier releases read logits.
OWN_HEAD = hasattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head")

#: TRL uses names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

STEPS = 4


class Fused(trl.SFTTrainer):
    """Trains on the model's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if model.training:
            self.logits = outputs.logits
        return (loss, outputs) if return_outputs else loss


class LargestLogits(TorchDispatchMode):
    """The most rows that any result of PyTorch's operators had whose last dimension is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == V and func is not torch.ops.aten.t:
            self.rows = max(self.rows, out.numel() // V)
        return out


def sft(cls, model, folder, evaluate=False, **given):
    """(the losses of all steps, the metrics of an evaluation, the trainer)."""
    prompts, completions = texts(0), texts(1)
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 0.3,
        "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "bf16": False,
        "report_to": "none", "use_cpu": True, "gradient_accumulation_steps": 2, "completion_only_loss": True,
        "max_length": 24, "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    data = datasets.Dataset.from_dict({"prompt": prompts, "completion": [" " + text for text in completions]})
    trainer = cls(
        model=model,
        args=trl.SFTConfig(**settings),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer_of(prompts + completions),
        **given,
    )
    trainer.train()
    metrics = trainer.evaluate() if evaluate else {}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], metrics, trainer


@pytest.mark.parametrize("lora", [False, True], ids=["", "LoRA"])
def test_the_models_own_loss(lora, tmp_path, monkeypatch):
    given = {}
    if lora:
        peft = pytest.importorskip("peft")
        given["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    reference, _, _ = sft(trl.SFTTrainer, llama(), tmp_path, **given)
    plain, _, _ = sft(Fused, llama(), tmp_path, **given)
    spy = spied(monkeypatch)
    losses, _, trainer = sft(Fused, patch_model(llama()), tmp_path, **given)
    assert_same(losses, plain)
    assert_same(losses, reference)
    assert spy.calls == 2 * STEPS
    assert type(trainer.logits) is DeferredLogits
    assert not trainer.logits.is_materialized


def test_no_logits_are_made(tmp_path):
    with LargestLogits() as plain:
        sft(Fused, llama(), tmp_path)
    with LargestLogits() as patched:
        sft(Fused, patch_model(llama()), tmp_path)
    assert patched.rows < plain.rows  # the head's own gradient has as many rows as hidden states have features


@pytest.mark.skipif(not OWN_HEAD, reason="this TRL reads the model's logits")
def test_the_loss_of_trl_itself(tmp_path, monkeypatch):
    """TRL's fused head bypasses the model's loss. Results are equal, and the patch fuses nothing."""
    plain, expected, _ = sft(trl.SFTTrainer, llama(), tmp_path, evaluate=True)
    spy = spied(monkeypatch)
    with pytest.warns(UserWarning, match=r"nothing was fused.*patch_trainer\(trainer\) fuses it"):
        losses, metrics, _ = sft(trl.SFTTrainer, patch_model(llama()), tmp_path, evaluate=True)
    assert_same(losses, plain)
    assert spy.calls == 0
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.skipif(not OWN_HEAD, reason="this TRL reads the model's logits")
def test_options_that_the_head_of_trl_drops_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ignore_index: given to patch_model"):
        sft(trl.SFTTrainer, patch_model(llama(), ignore_index=5), tmp_path)


@pytest.mark.parametrize("cls", [trl.SFTTrainer, Fused], ids=["TRL's loss", "the model's loss"])
@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_metrics_of_logits(cls, tmp_path):
    given = {
        "evaluate": True,
        "compute_metrics": lambda prediction: {"std": float(prediction.predictions.std())},
    }
    _, expected, _ = sft(cls, llama(), tmp_path, **given)
    _, metrics, _ = sft(cls, patch_model(llama()), tmp_path, **given)
    assert metrics["eval_std"] == pytest.approx(expected["eval_std"], rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
