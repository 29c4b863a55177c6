"""FSDP2 over two processes: every rank has tokens of its own and a part of all parameters.

Run it by `torchrun --standalone --nproc-per-node 2 examples/fsdp2.py [--model NAME] [--steps N]`.

The head belongs to the root module's FSDP group, so its weight is gathered while the loss is taken. Ranks ignore
unequal numbers of tokens, so the loss is divided by the count of all ranks.
"""

import itertools
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from data import batches, tokenized
from fused_ignore_ce.distributed import global_token_count
from fused_ignore_ce.hf import fusion_report, patch_model
from models import DEVICE, GPU, arguments, load

options = arguments()
if GPU:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
rank, ranks = dist.get_rank(), dist.get_world_size()

model, tokenizer = load(options.model)
model.to(DEVICE).train()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)  # embedding, last norm and head
patch_model(model)  # before or after fully_shard

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = batches(tokenized(tokenizer)[rank::ranks], 4, DEVICE)
for step, batch in enumerate(itertools.islice(data, options.steps), 1):
    count = global_token_count(batch["labels"][:, 1:])
    loss = model(**batch, num_items_in_batch=count / ranks).loss  # FSDP averages gradients over ranks
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / ranks
    dist.all_reduce(mean)
    if rank == 0 and (step == 1 or step % 5 == 0 or step == options.steps):
        print(f"step {step:3}  loss {mean.item():.4f}", flush=True)

if rank == 0:
    print(fusion_report(model))
dist.barrier()  # so that no rank leaves while another one still works
dist.destroy_process_group()
