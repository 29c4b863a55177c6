"""What a way of patching transformers models has to do for a "yes". A check raises where it does something else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bench.packages import version

from .checks import close
from .peers import NotOfferedError, as_in_kernels

V, D, T = 96, 32, 12


@dataclass(frozen=True)
class Patcher:
    """`patch(model, **options)` gives a transformers model a fused loss."""

    package: str
    patch: Callable[..., Any]
    unpatch: Callable[[Any], Any] | None = None
    #: Gives one output projection of any model a fused loss.
    defer: Callable[[torch.nn.Module], Any] | None = None


def _liger(model: Any, **options: Any) -> Any:
    """Liger's loss alone, without its other kernels."""
    from liger_kernel.transformers import monkey_patch

    if options:
        raise NotOfferedError("there is no such option")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kernels = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
    if base.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"{base.config.model_type} is not one of the {len(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)} model types"
        )
    monkey_patch._apply_liger_kernel_to_instance(model=base, **kernels)
    return model


def patchers() -> Iterator[Patcher]:
    from fused_ignore_ce import defer_logits
    from fused_ignore_ce.hf import patch_model, unpatch_model

    yield Patcher("fused_ignore_ce", patch_model, unpatch_model, defer_logits)
    if version("liger-kernel"):
        yield Patcher("Liger", _liger)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=T, use_cache=False, bos_token_id=0,
                   eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def run(model: Any, package: str) -> Any:
    """A training step's forward and backward."""
    with as_in_kernels() if package == "Liger" else nullcontext():
        outputs = model.train()(**batch())
        outputs.loss.backward()
    return outputs


def is_equal(patcher: Patcher, model: Any) -> Any:
    """Checks that patching changes neither loss nor gradients. Returns (patched, plain) outputs."""
    plain = copy.deepcopy(model)
    wanted = run(plain, "")
    found = run(patcher.patch(model), patcher.package)
    close("the loss", found.loss, wanted.loss.double())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            close(f"the gradient of {name}", ours.grad, theirs.grad.double(), tolerance=1e-3)
    return found, wanted


def readable_logits(patcher: Patcher) -> None:
    found, wanted = is_equal(patcher, llama())
    assert found.logits is not None, "outputs.logits is None"
    close("outputs.logits", found.logits + 0, wanted.logits.double())


def any_model(patcher: Patcher) -> None:
    is_equal(patcher, gpt2())


def head_bias(patcher: Patcher) -> None:
    model = llama()
    model.lm_head = torch.nn.Linear(D, V)
    torch.nn.init.normal_(model.lm_head.bias)
    is_equal(patcher, model)


def adapted_head(patcher: Patcher) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    is_equal(patcher, get_peft_model(llama(), config))


def more_ids(patcher: Patcher) -> None:
    second = int(batch()["labels"][0, -1])
    model = llama()
    logits = copy.deepcopy(model)(batch()["input_ids"]).logits[:, :-1]
    labels = batch()["labels"][:, 1:].masked_fill(batch()["labels"][:, 1:] == second, -100)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    close("the loss", run(patcher.patch(model, ignore_index=[second]), patcher.package).loss, wanted.double())


def unpatched(patcher: Patcher) -> None:
    if patcher.unpatch is None:
        raise NotOfferedError("there is no function that takes the patch back")
    model = llama()
    forward = type(model).forward
    patcher.unpatch(patcher.patch(model))
    assert type(model).forward is forward, "the model's forward is another one"


def several_heads(patcher: Patcher) -> None:
    """Two heads of a model of one's own, as for multi-token prediction, whose losses the model's code takes itself."""
    if patcher.defer is None:
        raise NotOfferedError("models of transformers only; the loss has to be called by hand")
    torch.manual_seed(0)
    body = torch.nn.Embedding(V, D)
    heads = torch.nn.ModuleList(torch.nn.Linear(D, V) for _ in range(2))
    ids = batch()["input_ids"]

    def gradients(heads: Any) -> list[torch.Tensor]:
        hidden = body(ids)
        loss = torch.zeros(())
        for depth, head in enumerate(heads, 1):
            logits = head(hidden)[:, :-depth]
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, depth:].flatten())
        return [loss, *torch.autograd.grad(loss, [body.weight, *heads.parameters()])]

    plain = gradients(heads)
    for found, wanted in zip(gradients(torch.nn.ModuleList(map(patcher.defer, heads))), plain, strict=True):
        close("the loss or a gradient", found, wanted.double())
