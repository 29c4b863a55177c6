"""transformers' Trainer: fine-tunes a small Llama on functions of Python's standard library, prompts ignored."""

import argparse
import ast
import itertools
import sysconfig
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_ignore_ce.hf import fusion_report, patch_model


def functions():
    """(signature, body) of functions of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 40:
                head, _, body = "\n".join(lines[node.lineno - 1 : node.end_lineno]).partition("\n")
                yield head + "\n", body


def encode(tokenizer, prompt, body, length):
    prompt, body = tokenizer.encode(prompt).ids[: length // 2], tokenizer.encode(body).ids
    ids = (prompt + body)[:length]
    padding = [0] * (length - len(ids))
    labels = [-100] * len(prompt) + ids[len(prompt) :] + [-100] * len(padding)  # prompt and padding are ignored
    return {"input_ids": ids + padding, "labels": labels, "attention_mask": [1] * len(ids) + padding}


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps
torch.manual_seed(0)

texts = list(itertools.islice(functions(), 600))
tokenizer = ByteLevelBPETokenizer()
tokenizer.train_from_iterator(itertools.chain(*texts), vocab_size=2048, special_tokens=["<pad>"], show_progress=False)
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
