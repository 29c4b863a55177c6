"""Functions for `rank_worker.py` that train a tiny model, patched or not, with DeepSpeed."""

import contextlib
import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import memory_of_heads
import peft
import torch
from hf_worker import V, batches, examples, llama
from live_memory import measured
from rank_environment import environment_of, states_of_accelerate

from fused_ignore_ce.hf import fusion_report, patch_model

STEPS = 3
gc.freeze()  # DeepSpeed collects garbage in every run, which takes a second with all that was imported


def config_of(stage, *, bf16=False, accumulate=1, rows=2):
    """A configuration that shards every parameter, however small it is, and holds them no longer than it must."""
    zero = {"stage": stage, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if stage == 3:
        names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        zero.update({f"stage3_{name}": 0 for name in names}, stage3_gather_16bit_weights_on_model_save=True)
        zero["allgather_sequential"] = True
    return {
        "train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": accumulate, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": bf16},
    }  # fmt: skip


def model_of(
    config, *, tied=False, frozen=False, made_partitioned=False, checkpointed=False, lora=False, patched=False
):
    sizes = {"tie_word_embeddings": tied, "pad_token_id": None, "use_cache": False}
    weights = llama(**sizes).state_dict()
    with deepspeed.zero.Init(config_dict_or_path=config) if made_partitioned else contextlib.nullcontext():
        model = llama(**sizes)
    if made_partitioned:
        assert model.lm_head.weight.numel() == 0
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(weights[name])
    model.lm_head.weight.requires_grad_(not frozen)
    if checkpointed:
        model.gradient_checkpointing_enable()
    if patched:
        patch_model(model)
    return with_adapters(model) if lora else model


def with_adapters(model):
    """LoRA on the head and in the body, whose second matrices are not zero."""
    torch.manual_seed(3)
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, adapters)


def adamw(parameters):
    """AdamW that does not blow up the rounding errors of gradients near zero."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def train(
    rank, patched, *, stage=3, accumulate=1, bf16=False, outside=False, between=False, folder=None, plain_linear=False,
    **of_model,
):  # fmt: skip
    """Losses of every step, what was computed between steps, parameters at the end, and the report.

    `outside` takes the loss after the forward, if it is "read" of logits that were read; `between` evaluates and
    generates after every step, and `folder` is where the model is saved.
    """
    environment_of(rank)
    config = config_of(stage, bf16=bf16, accumulate=accumulate)
    if plain_linear:  # in place of the one that DeepSpeed sets, for the whole process
        torch.nn.functional.linear = torch._C._nn.linear
        config["zero_optimization"]["memory_efficient_linear"] = False
    model = model_of(config, patched=patched, **of_model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trained)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
    if stage == 3:
        assert model.lm_head.weight.numel() == 0
    losses, seen = [], []
    for batch in batches(STEPS * accumulate, rows=2, seed=10 + rank):
        loss = loss_of(engine, batch, outside)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
        if between:
            seen.append(evaluated(engine, batch))
    found = {"losses": losses, "seen": seen, "parameters": parameters_of(model, stage)}
    if folder is not None:
        engine.save_16bit_model(folder, "model.bin")
    engine.destroy()
    return with_report(found, model, patched)


def with_report(found, model, patched):
    if patched:
        report = fusion_report(model)
        found.update(fused=sum(kind.calls for kind in report.fused.values()), reads=report.reads)
    return found


def loss_of(engine, batch, outside):
    if not outside:
        return engine(**batch).loss
    labels = batch.pop("labels")[:, 1:]
    logits = engine(**batch).logits[:, :-1]
    if outside == "read":
        logits = logits.sort(-1).values.gather(-1, logits.argsort(-1).argsort(-1))  # the same logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.flatten())


def evaluated(engine, batch):
    """The loss, logits and generated ids of a model that is being trained."""
    engine.eval()
    with torch.no_grad():
        outputs = engine(**batch)
        ids = engine.module.generate(batch["input_ids"][:1, :5], max_new_tokens=3, do_sample=False)
    engine.train()
    return {"loss": outputs.loss, "logits": outputs.logits.clone(), "ids": ids}


def parameters_of(model, stage=3):
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if stage == 3 else contextlib.nullcontext():
            found[name] = parameter.detach().clone()
    return found


def train_by_accelerate(rank, patched):
    from accelerate import Accelerator, DeepSpeedPlugin

    with states_of_accelerate(rank):
        config = config_of(3)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = model_of(config, patched=patched)
        engine, optimizer = accelerator.prepare(model, adamw(model.parameters()))
        assert model.lm_head.weight.numel() == 0
        losses = []
        for batch in batches(STEPS, rows=2, seed=10 + rank):
            loss = engine(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return with_report({"losses": losses, "parameters": parameters_of(model)}, model, patched)


def train_by_trainer(rank, patched, folder):
    from transformers import Trainer, TrainingArguments

    with states_of_accelerate(rank):
        config = config_of(3)
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, max_steps=STEPS, learning_rate=1e-2, logging_steps=1,
            lr_scheduler_type="constant", adam_epsilon=1e-4, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, deepspeed=config, max_grad_norm=0.0,
        )  # fmt: skip
        model = model_of(config, patched=patched)
        trainer = Trainer(model, arguments, train_dataset=examples(4 * STEPS, seed=10))
        trainer.train()
        assert model.lm_head.weight.numel() == 0
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model(f"{folder}/saved")
        return with_report({"losses": losses, "parameters": parameters_of(model)}, model, patched)


def memory(rank, patched, loss, frozen=False):
    """The memory of a step under ZeRO-3."""
    environment_of(rank)
    model = memory_of_heads.model_of(frozen)
    if patched:
        patch_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=adamw(trained), config=config_of(3, rows=1)
    )
    loss_of, batch = getattr(memory_of_heads, loss), memory_of_heads.first_batch(rank)
    found = measured(lambda: loss_of(engine, batch), engine.backward, memory_of_heads.HEAD)
    engine.destroy()
    return found
