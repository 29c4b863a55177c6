"""A plain PyTorch loop with a criterion of its own: a small Llama learns Python's standard library.

Prompts and padding are ignored. The model is given no labels, and the loss is fused nevertheless.
"""

import argparse
import ast
import itertools
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

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


def encode(tokenizer, prompt, body, length, pad):
    """Token ids and labels; nothing is masked but the prompt: the padding is left to ignore_index."""
    prompt, body = tokenizer.encode(prompt).ids[: length // 2], tokenizer.encode(body).ids
    ids = (prompt + body)[:length]
    ids += [pad] * (length - len(ids))
    return torch.tensor(ids), torch.tensor([-100] * len(prompt) + ids[len(prompt) :])


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
options = parser.parse_args()
torch.manual_seed(0)

texts = list(itertools.islice(functions(), 600))
tokenizer = ByteLevelBPETokenizer()
tokenizer.train_from_iterator(itertools.chain(*texts), vocab_size=2048, special_tokens=["<pad>"], show_progress=False)
PAD = tokenizer.token_to_id("<pad>")
data = [encode(tokenizer, prompt, body, 64, PAD) for prompt, body in texts]
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
