"""transformers' Trainer with evaluation. Neither the loss nor the accuracy needs all logits at once.

Run it by `python examples/trainer.py [--model NAME] [--steps N]`.
"""

import tempfile
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from data import tokenized
from fused_ignore_ce.hf import fusion_report, patch_model
from models import GPU, arguments, load

options = arguments()
model, tokenizer = load(options.model)
patch_model(model)  # the only change


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One id per token instead of logits. It is computed from a tile of logits at a time."""
    return logits.argmax(-1)


def accuracy(results: EvalPrediction) -> dict[str, Any]:
    predicted, labels = results.predictions[:, :-1], results.label_ids[:, 1:]
    return {"accuracy": (predicted == labels)[labels != -100].mean()}


with tempfile.TemporaryDirectory() as folder:
    rows = tokenized(tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=GPU,
            use_cpu=not GPU,
        ),
        train_dataset=rows[50:],
        eval_dataset=rows[:50],
        preprocess_logits_for_metrics=most_likely,
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.evaluate()
print(fusion_report(model))
