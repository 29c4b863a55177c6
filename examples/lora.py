"""LoRA adapters (PEFT) in transformers' Trainer. The head is frozen, so its gradient is not computed.

Run it by `python examples/lora.py [--model NAME] [--steps N]`.
"""

import tempfile

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from data import tokenized
from fused_ignore_ce.hf import fusion_report, patch_model
from models import GPU, arguments, load

options = arguments()
model, tokenizer = load(options.model)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
patch_model(model)  # before or after get_peft_model

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=GPU,
            use_cpu=not GPU,
        ),
        train_dataset=tokenized(tokenizer),
    )
    trainer.train()
model.print_trainable_parameters()
print(fusion_report(model))
