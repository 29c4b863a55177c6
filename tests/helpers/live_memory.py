"""Counts the bytes of tensors that are alive, whoever holds them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While this is on, `now()` is the size of what was allocated since, and `peak` its largest once that is set."""

    def __init__(self):
        super().__init__()
        self._storages = set()  # addresses of storages, with a weak reference to each
        self.peak = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type != "meta":
                self._storages.add(_Weak(t.untyped_storage()))
        if self.peak is not None:
            self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self._storages = {weak for weak in self._storages if weak.is_alive}
        return sum(weak.size for weak in self._storages)


class _Weak:
    """A weak reference to a storage. As long as it exists, no other storage has this address."""

    def __init__(self, storage):
        self._pointer = storage._weak_ref()

    def __del__(self):
        torch.UntypedStorage._free_weak_ref(self._pointer)

    def __eq__(self, other):
        return self._pointer == other._pointer

    def __hash__(self):
        return hash(self._pointer)

    @property
    def is_alive(self):
        return not torch.UntypedStorage._expired(self._pointer)

    @property
    def size(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self._pointer)
        return 0 if storage is None else storage.nbytes()


#: Losses of `memory_of_heads.py`, whether the head is frozen, and how many gradients of it may be there more than
#: without this package: a cross entropy computes the gradient in its forward, and scales it in its backward.
CASES = [("cross_entropy", True, 0), ("cross_entropy", False, 1), ("log_probs", True, 0), ("log_probs", False, 0)]


def measured(forward, backward, unit):
    """What a step holds when its forward is over, and at most in its forward and in its backward.

    In multiples of `unit` bytes. It is the second step, as wrappers prepare themselves in the first.
    """
    with LiveMemory() as memory:
        backward(forward())
        before = memory.peak = memory.now()
        loss = forward()
        held, in_forward = memory.now() - before, memory.peak - before
        memory.peak = memory.now()
        backward(loss)
        in_backward = memory.peak - before
    return {"held": held / unit, "in the forward": in_forward / unit, "in the backward": in_backward / unit}


def assert_gathered_no_longer(ours, plain, gradients, gathers=0):
    """A head's whole weight is in memory no longer than without this package.

    There may be `gradients` of it more, and in the forward `gathers` of its memory.
    """
    for mine, theirs in zip(ours, plain, strict=True):
        for when, heads in mine.items():
            more = max(gradients, gathers) if when == "in the forward" else gradients
            assert heads <= theirs[when] + more + 0.1, f"{when}: {mine}, without this package {theirs}"
