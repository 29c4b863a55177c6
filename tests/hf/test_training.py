"""transformers' Trainer and accelerate train a patched model as a plain one: the same losses, step by step."""

from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import patch_model

from ..helpers.hf_worker import V, assert_deferred, assert_same, batches, examples, llama, spied, trajectory

accelerate = pytest.importorskip("accelerate")  # which the Trainer needs

STEPS, LR = 5, 0.3
FP32, BF16 = 1e-5, 2e-2  # relative


pytestmark = pytest.mark.usefixtures("precision_of_its_own")


class Recorder(Trainer):
    """Keeps what each micro batch gave: its loss as it is divided, its logits, the count it was divided by."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.losses.append(loss.item())
            self.logits.append(outputs.logits)
            self.counts.append(None if num_items_in_batch is None else int(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss


def train(model, folder, *, recipe=None, evaluate=False, **given):
    """(the trainer, metrics of the evaluation)."""
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "max_steps": STEPS, "learning_rate": LR, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 1.0,
    }  # fmt: skip
    trainer = Recorder(
        model=model,
        args=TrainingArguments(**{**settings, **(recipe or {})}),
        train_dataset=examples(24),
        eval_dataset=examples(5, seed=2),
        **given,
    )
    trainer.losses, trainer.logits, trainer.counts = [], [], []
    trainer.train()
    return trainer, trainer.evaluate() if evaluate else {}


RECIPES = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    "bf16, accumulation, checkpointing": {
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "NEFTune": {"neftune_noise_alpha": 1.0},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_trainer(recipe, tmp_path, monkeypatch):
    plain, _ = train(llama(), tmp_path, recipe=recipe)
    spy = spied(monkeypatch)
    trainer, _ = train(patch_model(llama()), tmp_path, recipe=recipe)
    assert_same(trainer.losses, plain.losses, BF16 if "bf16" in recipe else FP32)
    assert len(trainer.losses) == spy.calls == STEPS * recipe.get("gradient_accumulation_steps", 1)
    assert all(type(logits) is DeferredLogits and not logits.is_materialized for logits in trainer.logits)
    assert trainer.counts == plain.counts
    assert None not in trainer.counts
    assert len(set(trainer.counts)) > 1  # the micro batches differ in their numbers of ignored tokens


@pytest.mark.parametrize("recipe", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_label_smoothing_of_the_trainer(recipe, tmp_path, monkeypatch):
    """The trainer takes the labels away from the model and computes the smoothed loss itself."""
    recipe = dict(label_smoothing_factor=0.2, **recipe)
    plain, _ = train(llama(), tmp_path, recipe=recipe)
    spy = spied(monkeypatch)
    trainer, _ = train(patch_model(llama()), tmp_path, recipe=recipe)
    assert_same(trainer.losses, plain.losses, BF16 if "bf16" in recipe else FP32)
    assert spy.calls == 0


def test_loss_function_of_the_caller(tmp_path):
    """`compute_loss_func` reads the logits of a model that had no labels."""
    loss = partial(ForCausalLMLoss, vocab_size=V)
    given = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: loss(outputs.logits, labels)}
    plain, _ = train(llama(), tmp_path, **given)
    trainer, _ = train(patch_model(llama()), tmp_path, **given)
    assert_same(trainer.losses, plain.losses, FP32)


def accuracy(prediction):
    logits, labels = prediction
    hits = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return {"accuracy": float(hits[labels[:, 1:] >= 0].sum()), "std": float(logits.std())}


def hits(prediction):
    return {"hits": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).sum())}


EVALUATIONS = {
    "loss only": {"recipe": {"prediction_loss_only": True}},
    "metrics": {"compute_metrics": accuracy},
    "preprocessed": {
        "compute_metrics": hits,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
    "bf16": {"compute_metrics": accuracy, "recipe": {"bf16": True}},
    "bf16 full": {"compute_metrics": accuracy, "recipe": {"bf16_full_eval": True}},
    "accumulated": {"compute_metrics": accuracy, "recipe": {"eval_accumulation_steps": 1}},
    "batch metrics": {
        "compute_metrics": lambda prediction, compute_result: accuracy(prediction),
        "recipe": {"batch_eval_metrics": True},
    },
}


@pytest.mark.parametrize("options", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation(options, tmp_path, monkeypatch):
    _, expected = train(llama(), tmp_path, evaluate=True, **options)
    spy = spied(monkeypatch)
    _, metrics = train(patch_model(llama()), tmp_path, evaluate=True, **options)
    names = {"eval_loss", "eval_accuracy", "eval_hits", "eval_std"} & expected.keys()
    assert names <= metrics.keys()
    assert len(names) > 1 or "prediction_loss_only" in options["recipe"]
    for name in names:
        assert metrics[name] == pytest.approx(expected[name], rel=BF16 if "bf16" in str(options) else FP32), name
    assert spy.calls == STEPS + 3  # evaluation has 5 rows, 2 per batch


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("patch", ["before", "after"])
def test_accelerate(precision, patch, monkeypatch):
    """The model is patched before or after it is prepared."""
    accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)

    def run(patched):
        model = llama()
        if patched and patch == "before":
            patch_model(model)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
        if patched and patch == "after":
            patch_model(prepared)
        return trajectory(prepared, batches(STEPS), optimizer=optimizer, backward=accelerator.backward)

    expected, _ = run(False)
    spy = spied(monkeypatch)
    losses, outputs = run(True)
    assert_same(losses, expected, BF16 if precision == "bf16" else FP32)
    assert_deferred(outputs)
    assert spy.calls == STEPS


@pytest.mark.parametrize("context", [partial(torch.autocast, "cpu", torch.bfloat16), None], ids=["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=str)
def test_bare_loop(context, options, monkeypatch):
    expected, _ = trajectory(llama(**options), batches(STEPS), context=context)
    spy = spied(monkeypatch)
    losses, outputs = trajectory(patch_model(llama(**options)), batches(STEPS), context=context)
    assert_same(losses, expected, BF16 if context else FP32)
    assert_deferred(outputs)
    assert spy.calls == STEPS
