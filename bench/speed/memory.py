"""Peak memory of forward and backward. Every figure comes from a fresh process, in which nothing else was allocated.

    python -m bench.speed.memory FUNCTION ARGUMENTS

FUNCTION is `loss_peak` or `step_peak`; ARGUMENTS are theirs, as a list in JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import ROOT
from bench.speed.providers import named
from bench.speed.workload import DEVICE, Case, tensors
from fused_ignore_ce.measure import PeakMemory

#: The training step: a Llama of these sizes, as transformers has it and patched, with these shares of ignored tokens.
WAYS = ("plain", "patched")
SHARES = (0.0, 0.75)
SIZES = {"V": 128256, "T": 2048, "D": 256, "layers": 2}


def of_loss(name: str, case: Case, budget: int | None = None) -> int:
    """Bytes that a loss holds at its peak, above its inputs and their gradients."""
    return _in_fresh_process("loss_peak", name, case, budget)


def of_training_step(way: str, share: float) -> int:
    """Bytes that a model's training step holds at its peak, above the model and its gradients. It runs on the CPU.

    `way` is one of `WAYS`, or "own-loop": patched, and the loss is taken of the logits after a forward without labels.
    """
    return _in_fresh_process("step_peak", way, share)


def _in_fresh_process(function: str, *arguments: Any) -> int:
    command = [sys.executable, "-m", "bench.speed.memory", function, json.dumps(arguments)]
    return int(subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout)


def loss_peak(name: str, fields: list[Any], budget: int | None) -> int:
    case = Case(*fields)
    provider = named(case.kind, name)
    loss = provider.build()
    options = {} if budget is None else {"memory_budget": budget}
    # A first call allocates thread pools, lazy imports and the GEMM library's buffers, which are not the loss's.
    warm = case if provider.compiled else case._replace(N=64, V=2048, D=256 if case.D else 0)
    loss(*tensors(warm, DEVICE)).backward()
    *inputs, target = tensors(case, DEVICE)
    with PeakMemory(DEVICE) as memory:
        loss(*inputs, target, **options).backward()
    gradients = 0 if provider.overwrites else sum(x.numel() * x.element_size() for x in inputs)
    return measured(memory) - gradients


def step_peak(way: str, share: float) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fused_ignore_ce.hf import patch_model

    torch.manual_seed(0)
    V, T, D, layers = SIZES.values()
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=layers, num_attention_heads=4,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if way != "plain":
        patch_model(model, without_labels=way == "own-loop")

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if way == "own-loop":
            logits = model(input_ids).logits[:, :-1].reshape(-1, V)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))
        else:
            loss = model(input_ids, labels=labels).loss
        loss.backward()
        return loss

    input_ids = torch.randint(V, (1, T))
    labels = input_ids.clone()
    labels[:, : round(T * share)] = -100
    step(input_ids[:, :64], labels[:, -64:])  # allocates thread pools, lazy imports and the gradients
    model.zero_grad(set_to_none=False)
    with PeakMemory(torch.device("cpu")) as memory:
        loss = step(input_ids, labels)
    assert loss.isfinite()
    return measured(memory)


def measured(memory: PeakMemory) -> int:
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    return memory.bytes


if __name__ == "__main__":
    functions: dict[str, Callable[..., int]] = {"loss_peak": loss_peak, "step_peak": step_peak}
    print(functions[sys.argv[1]](*json.loads(sys.argv[2])))
