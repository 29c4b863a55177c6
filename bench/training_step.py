"""Peak memory of a training step of a transformers model, as it is and patched: one fresh process a figure.

python -m bench.training_step WAY SHARE

The figure is in bytes above the model and its gradients. On a CPU, whatever the machine has. Beside the ways that are
compared in figures there is "own-loop": patched, and the loss is taken of the logits after a forward without labels.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fused_ignore_ce.measure import PeakMemory

ROOT = Path(__file__).parent.parent
WAYS = ("plain", "patched")
SHARES = (0.0, 0.75)
SIZES = {"V": 128256, "T": 2048, "D": 256, "layers": 2}


def peak(way: str, share: float) -> int:
    """In a fresh process: bytes at the peak of forward and backward, above the model and its gradients."""
    command = [sys.executable, "-m", "bench.training_step", way, str(share)]
    return int(subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout)


def measure(way: str, share: float) -> int:
    """As `peak`, in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fused_ignore_ce.hf import patch_model

    torch.manual_seed(0)
    V, T, D, layers = SIZES.values()
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=2 * D,
        num_hidden_layers=layers,
        num_attention_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if way != "plain":
        patch_model(model, without_labels=way == "own-loop")

    def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if way != "own-loop":
            loss = model(input_ids, labels=labels).loss
        else:
            logits = model(input_ids).logits[:, :-1].reshape(-1, V)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))
        loss.backward()
        return loss

    input_ids = torch.randint(V, (1, T))
    labels = input_ids.clone()
    labels[:, : round(T * share)] = -100
    step(input_ids[:, :64], labels[:, -64:])  # thread pools, lazy imports, the gradients
    model.zero_grad(set_to_none=False)
    with PeakMemory(torch.device("cpu")) as memory:
        loss = step(input_ids, labels)
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    assert loss.isfinite()
    return memory.bytes


if __name__ == "__main__":
    print(measure(sys.argv[1], float(sys.argv[2])))
