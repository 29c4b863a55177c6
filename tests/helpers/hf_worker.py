"""A tiny model, its batches and a training loop, for tests of patched models. Run as a script, one of two processes."""

import contextlib
import json
import os
import sys
import traceback
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fused_ignore_ce.deferred import DeferredLogits, affine
from fused_ignore_ce.hf import patch_model

V, T, PAD = 101, 14, 0


def llama(seed=0, cls=LlamaForCausalLM, **config):
    """A tiny Llama, with the same weights every time."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": PAD,
        "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    return cls(LlamaConfig(**{**sizes, **config}))


class MyLlama(LlamaForCausalLM):
    """Its forward takes a loss of its own, with shifted logits and label smoothing."""

    def forward(self, input_ids, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        if labels is not None:
            logits = outputs.logits[..., :-1, :].contiguous().float()
            target = labels[..., 1:].contiguous()
            outputs.loss = torch.nn.functional.cross_entropy(
                logits.view(-1, logits.size(-1)), target.view(-1), label_smoothing=0.1
            )
        return outputs


def examples(count, seed=1, ignored=-100):
    """Rows with unequal numbers of kept tokens: labels of prompts, and of padding on the right, are `ignored`."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        start = torch.randint(V, (1,), generator=generator)
        ids = 3 + (start + 7 * torch.arange(T)) % (V - 3)  # each id is 7 more than the one before, which can be learnt
        labels = ids.clone()
        labels[: 1 + 5 * i % 9] = ignored
        length = T - 3 * (i % 2)
        ids[length:] = PAD
        labels[length:] = ignored
        mask = torch.arange(T) < length
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask.long()})
    return made


def batches(steps, rows=3, **options):
    rows_of = torch.utils.data.DataLoader(examples(steps * rows, **options), batch_size=rows)
    return list(rows_of)


def trajectory(model, batches, *, lr=0.3, backward=torch.Tensor.backward, optimizer=None, context=None, outside=False):
    """Trains. Returns the loss of every step and the outputs of the last.

    With `outside`, the loss is taken after a forward without labels.
    """
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for batch in batches:
        with context() if context is not None else contextlib.nullcontext():
            if outside:
                labels = batch["labels"][:, 1:].reshape(-1)
                outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                outputs.loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels)
            else:
                outputs = model(**batch)
        backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    return losses, outputs


class Spy:
    """Counts the linear losses, in place of `fused_linear_cross_entropy`."""

    def __init__(self):
        self.calls = 0
        self.original = affine.fused_linear_cross_entropy

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.original(*args, **kwargs)


def spied(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(affine, "fused_linear_cross_entropy", spy)
    return spy


def assert_same(ours, expected, rel=1e-5):
    """Losses are equal up to rounding, and fall: the loss of a model that does not learn would hide wrong gradients."""
    assert len(ours) == len(expected)
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))
    assert difference <= rel, f"{difference:.1e} relative: {ours}, unpatched {expected}"
    assert max(expected) - min(expected) > 0.02 * max(expected), f"did not learn: {expected}"


def assert_deferred(outputs):
    assert type(outputs.logits) is DeferredLogits
    assert not outputs.logits.is_materialized


def sharded(model, *, layers=True, head=None, dtype=torch.float32, **root):
    """Shards by FSDP2: each layer, the head if `head` has options for it, and the rest."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers if layers else ():
        fully_shard(layer, mp_policy=policy)
    if head is not None:
        fully_shard(model.lm_head, mp_policy=policy, **head)
    return fully_shard(model, mp_policy=policy, **root)


#: How a model is wrapped for two processes. A second function, where there is one, patches the wrapped model.
DISTRIBUTED = {
    "DDP": DistributedDataParallel,
    "DDP, patched itself": (DistributedDataParallel, patch_model),
    "DDP, unused parameters": partial(DistributedDataParallel, find_unused_parameters=True),
    "DDP, static graph": partial(DistributedDataParallel, static_graph=True),
    "DDP, buckets are views": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "FSDP2, root": partial(sharded, layers=False),
    "FSDP2, layers": sharded,
    "FSDP2, patched itself": (sharded, patch_model),
    "FSDP2, root resharded": partial(sharded, reshard_after_forward=True),
    "FSDP2, bf16": partial(sharded, dtype=torch.bfloat16),
    "FSDP2, head kept": partial(sharded, head={"reshard_after_forward": False}),
    "FSDP2, head": partial(sharded, head={}),
    "FSDP1": partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True),
    "FSDP1, flat": partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=False),
}


def train_distributed(name, patched, rank):
    """This rank's losses on its own batches, and the calls of the linear loss. `patched`: False, True or "outside"."""
    wrap, patch_wrapped = DISTRIBUTED[name] if isinstance(DISTRIBUTED[name], tuple) else (DISTRIBUTED[name], None)
    model = llama()
    if patched and patch_wrapped is None:
        patch_model(model, without_labels=patched == "outside")
    model = wrap(model)
    if patched and patch_wrapped is not None:
        patch_wrapped(model, without_labels=patched == "outside")
    spy = affine.fused_linear_cross_entropy = Spy()
    try:
        losses, outputs = trajectory(model, batches(4, seed=10 + rank), lr=0.2, outside=patched == "outside")
    finally:
        affine.fused_linear_cross_entropy = spy.original
    if patched is True:
        assert_deferred(outputs)
    return {"losses": losses, "linear": spy.calls}


def main(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.use_deterministic_algorithms(True)
    with open(f"{folder}/{rank}", "w") as results:
        for name in DISTRIBUTED:
            for patched in (False, True, "outside"):
                try:
                    done = train_distributed(name, patched, rank)
                except Exception:
                    done = {"error": traceback.format_exc()}
                print(json.dumps([name, patched, done]), file=results, flush=True)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]), sys.argv[2])
