"""Training with transformers' Trainer, for tests of patched models."""

import pytest
from transformers import Trainer, TrainingArguments

from .hf_worker import examples

SETTINGS = {
    "per_device_train_batch_size": 2, "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant",
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def train(model, folder, recipe, *, cls=Trainer, data=None, **given):
    """A trainer that has trained the model, on `data` or on rows with unequal numbers of kept tokens."""
    pytest.importorskip("accelerate")  # which the Trainer needs
    arguments = TrainingArguments(output_dir=str(folder), **SETTINGS | recipe)
    trainer = cls(model=model, args=arguments, train_dataset=data or examples(24), **given)
    trainer.train()
    return trainer


def logged(trainer, name):
    """A value that the trainer logs, step by step."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]
