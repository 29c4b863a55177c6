"""Peak memory of a training step of a transformers model, as it is and patched: one fresh process a figure.

python -m bench.training_step            # the table
python -m bench.training_step WAY SHARE  # one figure, in bytes above the model and its gradients
"""

import subprocess
import sys

import torch

from fused_ignore_ce.hf import patch_model
from fused_ignore_ce.measure import PeakMemory

WAYS = ("plain", "patched")
SHARES = (0.0, 0.75)
V, T, D = 128256, 2048, 256


def peak(way: str, share: float) -> int:
    """In a fresh process: bytes at the peak of forward and backward, above the model and its gradients."""
    command = [sys.executable, "-m", "bench.training_step", way, str(share)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(way: str, share: float) -> int:
    """As `peak`, in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    model = LlamaForCausalLM(config)
    if way == "patched":
        patch_model(model)
    input_ids = torch.randint(V, (1, T))
    labels = input_ids.clone()
    labels[:, : round(T * share)] = -100
    model(input_ids[:, :64], labels=labels[:, -64:]).loss.backward()  # thread pools, lazy imports, the gradients
    model.zero_grad(set_to_none=False)
    with PeakMemory(torch.device("cpu")) as memory:
        outputs = model(input_ids, labels=labels)
        outputs.loss.backward()
    if memory.bytes is None:
        raise SystemExit("peak memory can be measured on Linux or on CUDA only")
    assert outputs.loss.isfinite()
    return memory.bytes


def _table() -> None:
    print(f"peak of a training step above model and gradients, MiB; T={T}, V={V}, D={D}, float32, {torch.__version__}")
    print(f"T x V logits alone: {T * V * 4 / 2**20:.0f}")
    for share in SHARES:
        figures = "".join(f"{way:>12} {peak(way, share) / 2**20:6.0f}" for way in WAYS)
        print(f"{share:4.0%} ignored{figures}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1], float(sys.argv[2])))
    else:
        _table()
