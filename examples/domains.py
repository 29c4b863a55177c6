"""transformers' Trainer that logs the loss of three domains, from the pass that computes the loss.

Run it by `python examples/domains.py [--model NAME] [--steps N]`.
"""

import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from data import IGNORED, functions, tokenized
from fused_ignore_ce.hf import fusion_report, patch_model
from models import GPU, arguments, load

DOMAINS = ["functions", "methods", "private methods"]


class DomainTrainer(Trainer):
    """Logs the mean loss of the tokens of each domain since the last log; rows have a `domain`."""

    sums: Any = 0.0  # (2, domains): losses and tokens

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        domain = inputs.pop("domain")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        losses = outputs.loss_stats.token_loss.view(len(domain), -1)  # 0 where ignored
        tokens = inputs["labels"][:, 1:] != IGNORED
        of_rows = torch.stack([losses.sum(1), tokens.sum(1)]).double()
        self.sums += of_rows.new_zeros(2, len(DOMAINS)).index_add_(1, domain, of_rows)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            means = zip(DOMAINS, (self.sums[0] / self.sums[1]).tolist(), strict=True)
            logs |= {f"loss of {name}": mean for name, mean in means if mean == mean}  # not NaN, of no token
            self.sums = 0.0
        super().log(logs, *args, **kwargs)


options = arguments()
model, tokenizer = load(options.model)
patch_model(model, return_stats=True)
rows: list[dict[str, Any]] = tokenized(tokenizer)
for row, (signature, _) in zip(rows, functions(), strict=True):
    row["domain"] = 0 if "(self" not in signature else 2 if "def _" in signature else 1

with tempfile.TemporaryDirectory() as folder:
    log = {"logging_steps": max(1, options.steps // 10), "save_strategy": "no", "report_to": "none"}
    machine = {"bf16": GPU, "use_cpu": not GPU, "disable_tqdm": True, "remove_unused_columns": False}
    batches = {"max_steps": options.steps, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    arguments_ = TrainingArguments(folder, **log, **machine, **batches)
    DomainTrainer(model=model, args=arguments_, train_dataset=rows).train()
print(fusion_report(model))
