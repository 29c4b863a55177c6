"""Names of PyTorch's methods: those that deferred logits answer without being computed, and those that write."""

from __future__ import annotations

#: Methods and attributes that deferred logits answer without being computed.
METADATA = frozenset({
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "dtype", "device", "layout",
    "requires_grad", "is_leaf", "grad_fn", "get_device", "is_floating_point", "is_complex", "element_size", "itemsize",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps",
    "is_inference", "is_neg", "is_conj", "output_nr", "name", "names", "_version", "_backward_hooks", "_base",
    "_is_view", "is_sparse_csr", "nbytes",
})  # fmt: skip


def writes(name: str) -> bool:
    """Whether an operation of this name writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "data") or (name.startswith("__i") and name in _IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)
