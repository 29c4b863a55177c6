"""Functions for `rank_worker.py` that train a tiny model, patched or not, with FSDP."""

import contextlib
from functools import partial
from unittest import mock

import memory_of_heads
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hf_worker import V, batches, examples, llama
from live_memory import measured
from rank_environment import states_of_accelerate
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from tp_worker import mesh_of, whole

from fused_ignore_ce import defer_logits
from fused_ignore_ce.hf import fusion_report, patch_model, unpatch_model

STEPS = 3


def in_groups(model, head=None, **options):
    """Shards each layer, the modules that `head` gives as a group, and the rest."""
    options.setdefault("mesh", mesh_of(dist.get_world_size()))
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head is not None:
        fully_shard(head(model), **options)
    return fully_shard(model, **options)


def first_version(model, use_orig_params=True, **options):
    """FSDP1, with the head wrapped by itself."""
    options.update(device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
    return FullyShardedDataParallel(model, **options)


def patched_by_itself(model):
    """A head to which `defer_logits` was applied once it was wrapped."""
    unpatch_model(model)
    wrapped = first_version(model)
    defer_logits(model.lm_head)
    return wrapped


def patched_afterwards(model):
    return patch_model(first_version(unpatch_model(model)))


def patched_too_soon(model):
    unpatch_model(model)
    defer_logits(model.lm_head)
    return first_version(model)


HEAD = {
    "alone": lambda model: model.lm_head,
    "with the embedding": lambda model: [model.model.embed_tokens, model.lm_head],
    "with the norm": lambda model: [model.model.norm, model.lm_head],
}
WRAPPED = {
    **{f"head {name}": partial(in_groups, head=head) for name, head in HEAD.items()},
    "head alone, resharded over two": partial(in_groups, head=HEAD["alone"], reshard_after_forward=2),
    "head alone, not resharded": partial(in_groups, head=HEAD["alone"], reshard_after_forward=False),
    "head with the norm, resharded over two": partial(in_groups, head=HEAD["with the norm"], reshard_after_forward=2),
    "offloaded": partial(in_groups, head=HEAD["alone"], offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "bf16, reduced in float32": partial(
        in_groups, head=HEAD["alone"], mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    ),
    "float32, reduced in bf16": partial(
        in_groups, head=HEAD["alone"], mp_policy=MixedPrecisionPolicy(torch.float32, torch.bfloat16)
    ),
    "tied": partial(in_groups, head=HEAD["with the embedding"]),
    "FSDP1, head alone": first_version,
    "FSDP1, head alone, flat": partial(first_version, use_orig_params=False),
    "FSDP1, head alone, kept": partial(first_version, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "FSDP1, bf16, reduced in float32": partial(
        first_version, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "FSDP1, patched afterwards": patched_afterwards,
    "FSDP1, defer_logits": patched_by_itself,
    "FSDP1, defer_logits too soon": patched_too_soon,
}


def train(rank, name, patched, outside=False):
    """Losses of every step, parameters at the end, and the report."""
    model = llama(tie_word_embeddings=name.startswith("tied"))
    if patched:
        patch_model(model)
    wrapped = WRAPPED[name](model)
    losses = []
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, eps=1e-4)
    for batch in batches(STEPS, rows=2, seed=10 + rank):
        if outside:
            labels = batch.pop("labels")[:, 1:]
            logits = wrapped(**batch).logits[:, :-1].float()
            if outside == "read":
                logits = logits.sort(-1).values.gather(-1, logits.argsort(-1).argsort(-1))  # the same logits
            loss = F.cross_entropy(logits.reshape(-1, V), labels.flatten())
        else:
            loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = {"losses": losses, "parameters": parameters_of(wrapped)}
    if patched:
        report = fusion_report(model)
        found.update(fused=sum(kind.calls for kind in report.fused.values()), reads=report.reads)
    return found


@contextlib.contextmanager
def fsdp2_of_accelerate(rank):
    """Lets accelerate shard by FSDP2 on CPUs. It can, but chooses DDP there, whatever it is asked for."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    made = Accelerator.__init__

    def init(self, *args, **kwargs):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
        made(self, *args, **kwargs)
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        assert self.is_fsdp2

    with states_of_accelerate(rank), mock.patch.object(Accelerator, "__init__", init):
        yield


def train_by_accelerate(rank, patched, outside=False):
    from accelerate import Accelerator

    with fsdp2_of_accelerate(rank):
        accelerator, model = Accelerator(cpu=True), llama()
        if patched:
            patch_model(model)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4))
        losses = []
        for batch in batches(STEPS, rows=2, seed=10 + rank):
            labels = batch.pop("labels")
            if outside:
                logits = model(**batch).logits[:, :-1].reshape(-1, V)
                loss = F.cross_entropy(logits, labels[:, 1:].flatten())
            else:
                loss = model(**batch, labels=labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return with_report({"losses": losses, "parameters": parameters_of(model)}, model, patched)


def train_by_trainer(rank, patched, folder):
    from transformers import Trainer, TrainingArguments

    with fsdp2_of_accelerate(rank):
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, max_steps=STEPS, learning_rate=1e-2, logging_steps=1,
            lr_scheduler_type="constant", adam_epsilon=1e-4, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        model = llama()
        if patched:
            patch_model(model)
        trainer = Trainer(model, arguments, train_dataset=examples(4 * STEPS, seed=10))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return with_report({"losses": losses, "parameters": parameters_of(trainer.model)}, trainer.model, patched)


def with_report(found, model, patched):
    assert isinstance(model.lm_head.weight, DTensor)
    if patched:
        report = fusion_report(model)
        found.update(fused=sum(kind.calls for kind in report.fused.values()), reads=report.reads)
    return found


def parameters_of(model):
    if not isinstance(model, FullyShardedDataParallel):
        return {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def memory(rank, name, patched, loss, frozen=False):
    """The memory of a step under FSDP."""
    model = memory_of_heads.model_of(frozen)
    if patched:
        patch_model(model)
    wrapped = WRAPPED[name](model)
    loss_of, batch = getattr(memory_of_heads, loss), memory_of_heads.first_batch(rank)
    return measured(lambda: loss_of(wrapped, batch), torch.Tensor.backward, memory_of_heads.HEAD)
