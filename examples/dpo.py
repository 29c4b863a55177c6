"""TRL's DPOTrainer with this package's log-probabilities, by one added line.

The model learns to prefer bodies of Python functions to stubs.

Run it by `python examples/dpo.py [--model NAME] [--steps N]`.
"""

import copy
import tempfile

from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer

from data import functions
from fused_ignore_ce.hf import fusion_report
from fused_ignore_ce.trl import patch_trainer
from models import GPU, arguments, load

STUB = "\n    raise NotImplementedError\n"

options = arguments()
model, tokenizer = load(options.model)
reference = copy.deepcopy(model)
disable_progress_bars()

with tempfile.TemporaryDirectory() as folder:
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            max_length=64,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=GPU,
            use_cpu=not GPU,
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "chosen": body, "rejected": STUB} for p, body in functions()]),
        processing_class=tokenizer,
    )
    patch_trainer(trainer)  # the only change; the reference model's head is replaced too
    trainer.train()
print(fusion_report(model))
print("reference model:", fusion_report(reference), sep="\n")
