"""Names of PyTorch's methods: those that deferred logits answer without being computed, and those that write."""

from __future__ import annotations

from typing import Any

#: Methods and attributes that the tensor itself answers: they tell of its shape and of its place in the graph.
NATIVE = frozenset({
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "dtype", "device", "layout", "stride",
    "requires_grad", "requires_grad_", "is_leaf", "grad_fn", "grad", "get_device", "is_floating_point", "is_complex",
    "element_size", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn",
    "is_xpu", "is_mps", "is_inference", "is_neg", "is_conj", "output_nr", "name", "names", "_version", "_base",
    "_backward_hooks", "_is_view", "is_sparse_csr", "nbytes", "is_contiguous", "storage_offset", "retain_grad",
    "retains_grad", "register_hook", "register_post_accumulate_grad_hook", "is_signed",
    "is_sparse_coo",
})  # fmt: skip

#: Functions that make a tensor like the logits without reading them.
FACTORIES = frozenset({
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "new_empty_strided", "zeros_like", "ones_like",
    "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
})  # fmt: skip

#: Functions of shapes and dtypes.
ON_SHAPES = frozenset({"result_type", "is_same_size"})

#: Methods that give away the memory of a tensor.
MEMORY = frozenset({"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__", "data"})


def writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether an operation of this name writes to a tensor that it is given."""
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place
        or name in ("__setitem__", "__set__ data")
        or (name.startswith("__i") and name in _IN_PLACE_OPERATORS)
        or "out" in kwargs
        or kwargs.get("inplace") is True
    )


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)
