"""TRL's SFTTrainer with this package's loss, by one added line. The model learns to complete Python functions.

Run it by `python examples/sft.py [--model NAME] [--steps N]`.
"""

import tempfile

from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from data import functions
from fused_ignore_ce.hf import fusion_report
from fused_ignore_ce.trl import patch_trainer
from models import GPU, arguments, load

options = arguments()
model, tokenizer = load(options.model)
disable_progress_bars()

with tempfile.TemporaryDirectory() as folder:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            max_length=64,
            completion_only_loss=True,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=GPU,
            use_cpu=not GPU,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": body} for prompt, body in functions()]),
        processing_class=tokenizer,
    )
    patch_trainer(trainer)  # the only change
    trainer.train()
print(fusion_report(model))
