"""One of the processes of `ranks.py`. It calls functions of this file or of `tp_worker.py` for them."""

import contextlib
import importlib
import os
import pickle
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import fused_ignore_ce
from fused_ignore_ce.distributed import ranks as distributed
from fused_ignore_ce.linear import calls
from fused_ignore_ce.linear.plan import VOCABULARY_BLOCKS, LinearPlan

#: Process groups of the first 1, 2, ... ranks, by the number of ranks.
GROUPS: dict = {}


def call(ranks, loss, tensors, wanted=(), upstream=None, compiled=None, backwards=1, plan=None, **options):
    """A loss and its gradients: {"loss", "stats", the gradient of each of `wanted`, "collectives"}, or {"error"}.

    "collectives" has the names of those that were called in forward and in backward. `plan` forces a plan of the linear
    loss. `compiled` is the backend of torch.compile; without it, the loss is not compiled.
    """
    tensors = {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}
    group = None if ranks is None else GROUPS[ranks]
    function = partial(getattr(fused_ignore_ce, loss), process_group=group, **options)
    if compiled:
        torch._dynamo.reset()
        torch.use_deterministic_algorithms(False)
        function = torch.compile(function, fullgraph=True, backend=compiled)
    counted = {}
    try:
        with counting(counted, "forward"), forced(plan):
            found = function(**tensors)
        loss, stats = found if type(found) is tuple else (found, None)
        if upstream is not None:
            with counting(counted, "backward"), forced(plan):
                for i in range(backwards):
                    (loss * upstream).sum().backward(retain_graph=i < backwards - 1)
    except Exception as error:
        return {"error": (type(error).__name__, str(error))}
    finally:
        torch.use_deterministic_algorithms(True)
    return {"loss": loss.detach(), "stats": stats, "collectives": counted, **{n: tensors[n].grad for n in wanted}}


def log_probs_and_entropy(ranks, tensors, upstream, plan, **options):
    """Both results of `fused_linear_log_probs`, and the gradients of a sum in which they have unequal weights."""
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    with forced(plan):
        log_probs, entropy = fused_ignore_ce.fused_linear_log_probs(
            **tensors, process_group=GROUPS[ranks], return_entropy=True, **options
        )
        (log_probs * upstream - 0.3 * entropy * upstream.flip(0)).sum().backward()
    return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), **{n: t.grad for n, t in leaves.items()}}


def second_derivative(ranks):
    """The message of the error that `create_graph=True` raises."""
    x = torch.randn(3, 4, requires_grad=True)
    loss = fused_ignore_ce.fused_cross_entropy(x, torch.tensor([1, 5, 7]), process_group=GROUPS[ranks])
    try:
        torch.autograd.grad(loss, x, create_graph=True)
    except NotImplementedError as error:
        return str(error)


@contextlib.contextmanager
def forced(plan):
    """Forces a plan of the linear loss, with chunks and blocks that divide nothing."""
    if plan is None:
        yield
        return

    def choose(sizes, memory_budget):
        return LinearPlan(plan, max(1, sizes.V * 2 // 5) if plan == VOCABULARY_BLOCKS else 4, 0)

    with mock.patch.object(calls, "choose", choose):
        yield


@contextlib.contextmanager
def counting(counted, phase):
    """Records the names of the collectives that are called, in order, in `counted[phase]`."""
    names = counted.setdefault(phase, [])

    def wrap(name, function):
        def called(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        return called

    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather_object", "reduce_scatter_tensor", "broadcast"):
            stack.enter_context(mock.patch.object(dist, name, wrap(name, getattr(dist, name))))
        stack.enter_context(mock.patch.object(distributed, "_all_gather", wrap("all_gather", distributed._all_gather)))
        yield


def main(rank, world, folder):
    if architecture := os.environ.get("TEST_COMPILED"):  # as in conftest.py
        sys.path.append(str(Path(__file__).parents[2]))
        from bench.proofs.emulator.launching import emulated

        emulator = emulated(int(architecture), all_orders=True)
        emulator.__enter__()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what is printed is not taken for an answer
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
            module, _, function = name.rpartition(".")
            functions = importlib.import_module(module).__dict__ if module else globals()
            answer = True, functions[function](**kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
    os._exit(0)  # skips the group's shutdown, which waits for ranks that may be gone


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
