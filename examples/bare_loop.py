"""A plain PyTorch loop with a criterion of its own: a small Llama learns Python's standard library.

Prompts and padding are ignored. The model is given no labels, and the loss is fused nevertheless.
"""

import argparse
import itertools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data import encode, texts_and_tokenizer
from fused_ignore_ce.hf import fusion_report, patch_model

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
patch_model(model, ignore_index=PAD, without_labels=True)  # the only change; ignores <pad> beside the criterion's -100
criterion = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step, (ids, labels) in enumerate(itertools.islice(batches, options.steps), 1):
    logits = model(input_ids=ids).logits[:, :-1]
    loss = criterion(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 5 == 0 or step == options.steps:
        print(f"step {step:3}  loss {loss.item():.4f}", flush=True)

print(fusion_report(model))
