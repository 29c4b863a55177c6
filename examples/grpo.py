"""TRL's GRPOTrainer with this package's log-probabilities, by one added line.

The reward is the share of lower-case letters.

Run it by `python examples/grpo.py [--model NAME] [--steps N]`.
"""

import tempfile
from typing import Any

from datasets import Dataset, disable_progress_bars
from trl import GRPOConfig, GRPOTrainer

from data import functions
from fused_ignore_ce.hf import fusion_report
from fused_ignore_ce.trl import patch_trainer
from models import GPU, arguments, load

options = arguments()
model, tokenizer = load(options.model)
disable_progress_bars()


def lower_case(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(str.islower, text)) / max(1, len(text)) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model,
        lower_case,
        args=GRPOConfig(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=16,
            learning_rate=1e-2,
            beta=0.0,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=GPU,
            use_cpu=not GPU,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _ in functions()]),
        processing_class=tokenizer,
    )
    patch_trainer(trainer)  # the only change
    trainer.train()
print(fusion_report(model))
