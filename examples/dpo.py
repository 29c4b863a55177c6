"""TRL's DPOTrainer with this package's log-probabilities, by one line: bodies of Python functions, not stubs."""

import argparse
import copy
import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from data import texts_and_tokenizer
from fused_ignore_ce.hf import fusion_report
from fused_ignore_ce.trl import patch_trainer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps
torch.manual_seed(0)
disable_progress_bars()

texts, bpe = texts_and_tokenizer("<pad>", "<end>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<end>")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))

with tempfile.TemporaryDirectory() as folder:
    arguments = DPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, max_length=64, bf16=False,
        logging_steps=max(1, steps // 10), save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rejected = [f"    raise NotImplementedError({prompt.strip()!r})\n" for prompt, _ in texts]
    data = Dataset.from_list(
        [{"prompt": p, "chosen": body, "rejected": other} for (p, body), other in zip(texts, rejected, strict=True)]
    )
    reference = copy.deepcopy(model)
    trainer = DPOTrainer(model, reference, args=arguments, train_dataset=data, processing_class=tokenizer)
    patch_trainer(trainer)
    trainer.train()
print(fusion_report(model))
print("reference model:", fusion_report(reference), sep="\n")
