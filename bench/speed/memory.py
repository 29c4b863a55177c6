"""Peak memory of forward and backward. Every figure comes from a fresh process, in which nothing else was allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_ignore_ce.tools.measure import PeakMemory

from ..machine import in_processes
from .providers import named
from .workload import DEVICE, Case, tensors

#: The training step is that of a Llama of these sizes, plain and patched, with these shares of ignored tokens.
WAYS = ("plain", "patched")
SHARES = (0.0, 0.75)
SIZES = {"V": 128256, "T": 2048, "D": 256, "layers": 2}


def of_loss(name: str, case: Case, budget: int | None = None) -> int:
    """Bytes that a loss holds at its peak, above its inputs and their gradients."""
    return in_processes(_of_loss, name, case, budget)[0]


def of_training_step(way: str, share: float, sizes: dict[str, int] = SIZES) -> int:
    """Bytes that a model's training step holds at its peak, above the model and its gradients. It runs on the CPU.

    `way` is one of `WAYS`, or "own-loop": a patched model gets no labels, and the loss is taken from its logits.
    `sizes` are the model's, by the names of `SIZES`.
    """
    return in_processes(_of_training_step, way, share, sizes)[0]


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """Bytes that a function holds at its peak, above what was there before."""
    with PeakMemory(device) as memory:
        run()
    if memory.bytes is None:
        raise RuntimeError("peak memory can be measured on Linux or on CUDA only")
    return memory.bytes


def _of_loss(_: int, name: str, case: Case, budget: int | None) -> int:
    provider = named(case.kind, name)
    loss = provider.build()
    options = {} if budget is None else {"memory_budget": budget}
    # A first call starts thread pools, runs lazy imports and allocates the GEMM library's buffers; none are the loss's.
    warm = case if provider.compiled else case._replace(N=64, V=2048, D=256 if case.D else 0)
    loss(*tensors(warm, DEVICE)).backward()
    *inputs, target = tensors(case, DEVICE)
    peak = peak_bytes(DEVICE, lambda: loss(*inputs, target, **options).backward())
    return peak - (0 if provider.overwrites else sum(x.nbytes for x in inputs))


def _of_training_step(_: int, way: str, share: float, sizes: dict[str, int]) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fused_ignore_ce.hf import patch_model

    torch.manual_seed(0)
    V, T, D, layers = sizes.values()
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=layers, num_attention_heads=4,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if way != "plain":
        patch_model(model)

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        if way == "own-loop":
            logits = model(input_ids).logits[:, :-1].reshape(-1, V)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))
        else:
            loss = model(input_ids, labels=labels).loss
        loss.backward()
        assert loss.isfinite()

    input_ids = torch.randint(V, (1, T))
    labels = input_ids.clone()
    labels[:, : round(T * share)] = -100
    step(input_ids[:, :64], labels[:, -64:])  # starts thread pools, runs lazy imports, allocates gradients
    model.zero_grad(set_to_none=False)
    return peak_bytes(torch.device("cpu"), lambda: step(input_ids, labels))
