"""Counts the bytes of tensors that are alive, whoever holds them, while a model is trained."""

import gc

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While this is on, `now()` is the size of what was allocated since, and `peak` its largest once that is set.

    The package looks whether a dispatch mode is on, and calls operators then, which take more memory. It is told that
    none is, so that what is measured is what users have.
    """

    def __init__(self):
        super().__init__()
        self._storages = set()  # addresses of storages, with a weak reference to each
        self.peak = None

    def __enter__(self):
        self._modes = torch._C._len_torch_dispatch_stack
        torch._C._len_torch_dispatch_stack = lambda: 0
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._len_torch_dispatch_stack = self._modes
        super().__exit__(*error)

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


#: Losses of `memory_of_heads.py`, whether the head is frozen, and how many gradients of it are held for the backward
#: that are not without this package: a cross entropy computes the gradient in its forward.
CASES = [("cross_entropy", True, 0), ("cross_entropy", False, 1), ("log_probs", True, 0), ("log_probs", False, 0)]

STEPS = 3

#: In heads.
TOLERANCE = 0.1


def measured(forward, backward, unit):
    """What a step holds when its forward is over, and at most in its forward and in its backward.

    In multiples of `unit` bytes, beside what is there between two steps. The figures are the least of several steps,
    as threads that communicate let go of a tensor a moment sooner or later. The first step does not count: wrappers
    prepare themselves in it.
    """
    steps = []
    with LiveMemory() as memory:
        backward(forward())
        gc.collect()
        gc.freeze()  # collections are fast then
        try:
            for _ in range(STEPS):
                gc.collect()
                before = memory.peak = memory.now()
                loss = forward()
                held, in_forward = memory.now() - before, memory.peak - before
                memory.peak = memory.now()
                backward(loss)
                del loss
                steps.append((held, in_forward, memory.peak - before))
        finally:
            gc.unfreeze()
    names = ("held", "in the forward", "in the backward")
    return {name: min(figures) / unit for name, figures in zip(names, zip(*steps, strict=True), strict=True)}


def assert_gathered_no_longer(ours, plain, gradients, gathers=0, backward=0.0):
    """A head's whole weight is in memory no longer than without this package.

    From the forward on, `gradients` of it may be held more, and in the forward `gathers` of its memory as well. The
    peak of the backward is higher by `backward` at most.
    """
    for mine, theirs in zip(ours, plain, strict=True):
        for when, heads in mine.items():
            more = {"held": gradients, "in the forward": gradients + gathers, "in the backward": backward}[when]
            assert heads <= theirs[when] + more + TOLERANCE, f"{when}: {mine}, without this package {theirs}"
