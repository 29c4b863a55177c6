"""One of the processes of `ranks.py`: runs the functions of this file that it is asked for, as one rank of several."""

import os
import pickle
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

import fused_ignore_ce

GROUPS = {}


def group_of(ranks):
    """The group of the first `ranks` ranks."""
    return GROUPS[ranks]


def call(ranks, loss, tensors, wanted=(), upstream=None, autocast=None, **options):
    """A loss with its gradients: {"loss", "stats", and the gradient of each of `wanted`}, or {"error"}."""
    tensors = {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}
    group = None if ranks is None else group_of(ranks)
    try:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            found = getattr(fused_ignore_ce, loss)(**tensors, process_group=group, **options)
    except Exception as error:
        return {"error": (type(error).__name__, str(error))}
    loss, stats = found if isinstance(found, tuple) else (found, None)
    if upstream is not None:
        (loss * upstream).sum().backward()
    return {"loss": loss.detach(), "stats": stats, **{name: tensors[name].grad for name in wanted}}


def main(rank, world, folder):
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for ranks in range(1, world + 1):
        GROUPS[ranks] = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=60))
    torch.use_deterministic_algorithms(True)
    while True:
        try:
            name, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = True, globals()[name](**kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
    os._exit(0)  # without the group's farewell, which waits for ranks that may be gone


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
