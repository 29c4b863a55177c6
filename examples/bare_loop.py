"""A plain PyTorch loop: a small Llama learns Python's standard library; prompts and padding are ignored."""

import argparse
import itertools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data import encode, texts_and_tokenizer
from fused_ignore_ce.hf import patch_model

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
options = parser.parse_args()
torch.manual_seed(0)

texts, tokenizer = texts_and_tokenizer("<pad>")
PAD = tokenizer.token_to_id("<pad>")
rows = [encode(tokenizer, prompt, body, 64, padding_label=PAD) for prompt, body in texts]
columns = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
data = torch.utils.data.TensorDataset(*columns)
batches = itertools.cycle(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
)
patch_model(model, ignore_index=PAD)  # the only change: the loss is fused, and ignores <pad> beside -100
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

materialized = 0
for step, (ids, labels) in enumerate(itertools.islice(batches, options.steps), 1):
    outputs = model(input_ids=ids, labels=labels)
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    materialized += outputs.logits.is_materialized
    if step == 1 or step % 5 == 0 or step == options.steps:
        print(f"step {step:3}  loss {outputs.loss.item():.4f}", flush=True)

size = outputs.logits.numel() * outputs.logits.element_size() / 2**20
print(f"logits materialized in {materialized} of {options.steps} steps; they would have taken {size:.1f} MiB each")
