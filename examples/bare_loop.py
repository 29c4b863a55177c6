"""A plain PyTorch loop with a criterion of its own; the head is the embedding's weight.

Run it by `python examples/bare_loop.py [--model NAME] [--steps N]`.

The model is given no labels, and the loss is fused nevertheless. Prompts (-100) and padding are ignored.
"""

import itertools

import torch

from data import batches, tokenized
from fused_ignore_ce.hf import fusion_report, patch_model
from models import DEVICE, arguments, load

options = arguments()
model, tokenizer = load(options.model, tied=True)
model.to(DEVICE).train()
PAD = tokenizer.pad_token_id
patch_model(model, ignore_index=PAD)  # the only change; padding is ignored as well as the criterion's -100

criterion = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = batches(tokenized(tokenizer, padding_label=PAD), 4, DEVICE)

for step, batch in enumerate(itertools.islice(data, options.steps), 1):
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    loss = criterion(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 5 == 0 or step == options.steps:
        print(f"step {step:3}  loss {loss.item():.4f}", flush=True)

print(fusion_report(model))
