"""A model whose head is most of it, and losses of its logits, for tests of how long the whole head is in memory."""

import torch
from hf_worker import V, batches, llama

CLASSES, HIDDEN = 12000, 512  # 25 MB, beside which what else a process allocates is little
#: The bytes of the head's whole weight.
HEAD = 4 * CLASSES * HIDDEN


def model_of(frozen):
    sizes = {"vocab_size": CLASSES, "hidden_size": HIDDEN, "head_dim": 16, "num_hidden_layers": 1}
    model = llama(**sizes, use_cache=False)
    model.model.embed_tokens = torch.nn.Embedding(V, HIDDEN)
    model.lm_head.weight.requires_grad_(not frozen)
    return model


def cross_entropy(model, batch):
    return model(**batch).loss


def log_probs(model, batch):
    """A loss whose gradients are known in the backward only."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])
    return (picked.squeeze(-1) * torch.linspace(0.5, 1.5, picked.shape[1])).mean()


def first_batch(rank):
    (batch,) = batches(1, rows=1, seed=10 + rank)
    return batch
