"""transformers' Trainer: fine-tunes a small Llama on functions of Python's standard library, prompts ignored."""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from data import encode, texts_and_tokenizer
from fused_ignore_ce.hf import fusion_report, patch_model

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps
torch.manual_seed(0)

texts, tokenizer = texts_and_tokenizer("<pad>")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = patch_model(LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)))  # the only change

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3,
        logging_steps=max(1, steps // 10), save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [encode(tokenizer, prompt, body, 64) for prompt, body in texts]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
print(fusion_report(model))
