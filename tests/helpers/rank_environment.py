"""What launchers such as torchrun set in the environment of a rank, for libraries that ask for it."""

import os

import torch.distributed as dist


def environment_of(rank):
    world = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
