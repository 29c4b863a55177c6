"""A head that is sharded on the vocabulary over two processes (tensor parallelism).

Run it by `torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py [--model NAME] [--steps N]`.

Each rank has a part of the head's rows. The loss takes two collectives in forward, of a few numbers per token, and one
in backward. Neither the logits nor the head are ever gathered.
"""

import itertools
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from data import batches, tokenized
from fused_ignore_ce.hf import fusion_report, patch_model
from models import DEVICE, GPU, arguments, load

options = arguments()
if GPU:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
rank = dist.get_rank()

model, tokenizer = load(options.model)
model.to(DEVICE).train()
parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
patch_model(model)  # the only change

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = batches(tokenized(tokenizer), 4, DEVICE)  # the same for all ranks
for step, batch in enumerate(itertools.islice(data, options.steps), 1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step == 1 or step % 5 == 0 or step == options.steps):
        print(f"step {step:3}  loss {loss.item():.4f}", flush=True)

if rank == 0:
    rows = model.lm_head.weight.to_local().shape[0]
    print(f"this rank holds {rows} of {model.lm_head.weight.shape[0]} rows of the head")
    print(fusion_report(model))
dist.barrier()  # so that no rank leaves while another one still works
dist.destroy_process_group()
