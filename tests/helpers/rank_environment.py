"""What launchers such as torchrun set in the environment of a rank, for libraries that ask for it."""

import contextlib
import os

import torch.distributed as dist


def environment_of(rank):
    world = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


@contextlib.contextmanager
def states_of_accelerate(rank):
    """What accelerate keeps for the whole process, for one run only."""
    from accelerate.state import AcceleratorState

    environment_of(rank)
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)
