"""Fine-tunes a small model whose head is sharded on the vocabulary, on prompts that are ignored.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py [--steps N]

Each rank has a part of the head's rows. The loss takes two collectives in forward, of a few numbers per token, and one
in backward. Neither the logits nor the head are ever gathered.
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from data import encode, texts_and_tokenizer
from fused_ignore_ce.hf import fusion_report, patch_model

VOCABULARY, BATCH = 8191, 4  # 8191 does not divide by two: shards may be uneven


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """Functions of Python's standard library; every rank gets the same ones."""
    texts, tokenizer = texts_and_tokenizer("<pad>")
    rows = itertools.cycle(encode(tokenizer, prompt, body, 64) for prompt, body in texts)
    while True:
        batch = list(itertools.islice(rows, BATCH))
        yield {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    for step, batch in enumerate(itertools.islice(batches(), steps)):
        outputs = model(**{name: t.to(device) for name, t in batch.items()})
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
