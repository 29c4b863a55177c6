"""The names of PyTorch's operations, by what deferred logits do when they meet them."""

from __future__ import annotations

from typing import Any

import torch

#: Recorded: operations on elements, whose tensors broadcast against the logits. Comparisons are not recorded: the mask
#: that they give is small, and read at once.
ELEMENTWISE = frozenset({
    # What transformers' models do between head and loss: scales, softcaps, biases, the sum of two heads (LoRA).
    "mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "tanh", "add", "__add__",
    "__radd__", "sub", "subtract", "__sub__",
    # Entropies and divergences of TRL's trainers, and published losses of probabilities.
    "neg", "negative", "__neg__", "exp", "exp2", "expm1", "log", "log2", "log1p", "square", "sqrt", "rsqrt", "abs",
    "kl_div",  # with reduction="none"; a sum is a sum of these
    "sigmoid", "sin", "relu", "reciprocal", "xlogy", "pow", "__pow__", "__rsub__", "rsub", "__rtruediv__",
    # Classes that are masked, and probabilities that are kept away from 0.
    "masked_fill", "clamp", "clamp_min", "clamp_max", "nan_to_num",
})  # fmt: skip
#: Recorded: operations on whole rows that keep their shape. Most losses of probabilities begin with one.
NORMALIZING = frozenset({"softmax", "log_softmax"})
#: Recorded: casts, and their dtypes. Most models cast their logits to float32 before the loss.
CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16, "to": None,
    "type_as": None,
}  # fmt: skip
#: Recorded: operations that leave the values as they are.
SAME = frozenset({"clone", "contiguous", "detach"})
#: Recorded: operations on rows and slices of the vocabulary; their rules are in `rows.py`. Models shift, flatten and
#: pick rows, and cut off a padded vocabulary.
ON_ROWS = frozenset({
    "__getitem__", "view", "reshape", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flatten",
    "unsqueeze", "squeeze", "select", "index_select", "narrow", "unbind", "split", "chunk",
})  # fmt: skip
#: The closed list of operations that are recorded.
RECORDED = ELEMENTWISE | NORMALIZING | CASTS.keys() | SAME | ON_ROWS

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
MEMORY = frozenset({"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__", "data",
                    "__reduce_ex__"})  # fmt: skip


def writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether an operation of this name writes to a tensor that it is given."""
    in_place = name.endswith("_") and not name.endswith("__") and name not in NATIVE
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
