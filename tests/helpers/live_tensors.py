"""Counts the bytes of tensors that are alive, whoever holds them."""

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
