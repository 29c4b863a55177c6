"""Fine-tunes a small model whose head is sharded on the vocabulary, on prompts that are ignored.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py [--steps N]

Each rank has a part of the vocabulary's rows of the head. The loss takes two collectives in forward, of a few numbers a
token, and one in backward; neither logits nor the head are ever gathered.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from fused_ignore_ce.hf import fusion_report, patch_model

VOCABULARY, BATCH, TOKENS, PROMPT = 8191, 4, 64, 40  # 8191 does not divide by two: shards may be uneven


def batch(step: int) -> dict[str, torch.Tensor]:
    """Sequences that count in steps of seven, of which only the end is to be learnt; the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    input_ids = (start + 7 * torch.arange(TOKENS)) % 200
    labels = input_ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": input_ids, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    patch_model(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        outputs = model(**{name: t.to(device) for name, t in batch(step).items()})
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step:3}  loss {outputs.loss.item():.4f}", flush=True)
    if dist.get_rank() == 0:
        rows = model.lm_head.weight.to_local().shape[0]
        print(f"last loss {outputs.loss.item():.4f}; this rank holds {rows} of {VOCABULARY} rows of the head")
        print(fusion_report(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
