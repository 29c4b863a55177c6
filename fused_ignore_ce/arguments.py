"""Arguments as the backends want them, or an error that says what was expected and what came.

Classes of errors follow `torch.nn.functional.cross_entropy`, so that code which catches its errors catches ours.
Nothing here looks at the values of a tensor, so nothing waits for the device.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .autograd import RowOptions

REDUCTIONS = ("none", "mean", "sum")
BACKENDS = ("auto", "triton", "torch")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ignored_ids(ignore_index: int | Collection[int]) -> tuple[int, ...]:
    """`ignore_index` as a tuple of ints."""
    given: Any = ignore_index
    if not isinstance(given, Collection) or isinstance(given, (Tensor, str, bytes)):
        given = (given,)
    try:
        if any(isinstance(i, bool) for i in given):
            raise TypeError
        ids = tuple(dict.fromkeys(operator.index(i) for i in given))
    except TypeError:
        hint = "; pass ignore_index.tolist()" if isinstance(ignore_index, Tensor) else ""
        raise TypeError(f"ignore_index: expected an int or a collection of ints, got {ignore_index!r}{hint}") from None
    if not ids:
        raise ValueError("ignore_index: expected at least one id, got an empty collection")
    return ids


def row_options(
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float
) -> RowOptions:
    if not torch.compiler.is_compiling():  # there they may be symbols
        _check_numbers(label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap: expected a number above 0 or None, got {softcap!r}")
    return RowOptions(
        ignore_index,
        float(label_smoothing),
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(z_loss),
    )


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is None:
            continue
        if not hasattr(value, "__float__"):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if math.isinf(value) or (math.isnan(value) and name in ("logit_scale", "z_loss")):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_reduction(reduction: str, normalizer: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected one of {REDUCTIONS}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'normalizer: divides the sum of reduction="mean" only, got reduction="{reduction}"')
    if isinstance(normalizer, Tensor) and normalizer.dim() != 0:
        raise ValueError(f"normalizer: expected a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")


def is_distributed(process_group: Any, *tensors: Tensor | None) -> bool:
    """Whether the vocabulary may be sharded: by a group, or since there is a DTensor."""
    check_process_group(process_group)
    distributed_tensor = sys.modules.get("torch.distributed.tensor")
    return process_group is not None or (
        distributed_tensor is not None and any(isinstance(t, distributed_tensor.DTensor) for t in tensors)
    )


def check_process_group(process_group: Any) -> None:
    if process_group is None:
        return
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed ProcessGroup or None, got {type(process_group).__name__}; "
            "of a DeviceMesh, pass mesh.get_group(dimension)"
        )


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend, "triton" or "torch", for tensors on this device."""
    check_backend(backend)
    if backend == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return backend


def check_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, *, weight_dtype: torch.dtype | None = None
) -> bool:
    """Checks dtypes, shapes and devices; tells whether `target` holds probabilities.

    `weight_dtype` is a dtype of class weights to allow beside input's.
    """
    for name, t in (("input", input), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"input: expected one of {FLOATS}, got {input.dtype}")
    if input.dim() == 0:
        raise RuntimeError("input: expected shape (C), (N, C) or (N, C, d1, ..., dK), got a 0-d tensor")
    for name, other in (("target", target), ("weight", weight)):
        if other is not None and other.device != input.device:
            raise RuntimeError(f"{name}: expected a tensor on {input.device}, where input is, got {other.device}")
    is_probs = target.shape == input.shape
    C = input.shape[0 if input.dim() == 1 else 1]
    if is_probs:
        if not target.is_floating_point():
            raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    else:
        _check_index_target(input, target)
    if weight is not None:
        any_dtype = is_probs or weight.dtype == weight_dtype or torch.is_autocast_enabled(input.device.type)
        _check_weight(input, weight, C, any_dtype)
    return is_probs


def _check_index_target(input: Tensor, target: Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"target: expected dtype int64 or uint8 for class indices, got {target.dtype}")
    if input.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise RuntimeError(f"target: expected shape () for an input of shape (C), got {tuple(target.shape)}")
        return
    expected = (input.shape[0], *input.shape[2:])
    if target.dim() > 0 and target.shape[0] != input.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({target.shape[0]})."
        )
    if target.shape != expected:
        raise RuntimeError(
            f"target: expected size {expected} for an input of size {tuple(input.shape)}, got {tuple(target.shape)}"
        )


def _check_weight(input: Tensor, weight: Tensor, C: int, any_dtype: bool) -> None:
    if weight.shape != (C,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {C} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )
    if not weight.is_floating_point() or not (any_dtype or weight.dtype == input.dtype):
        raise RuntimeError(f"weight: expected scalar type {input.dtype}, as input has, got {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight: no gradient with respect to class weights is defined; pass weight.detach()")


def check_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
) -> bool:
    """Checks dtypes, shapes and devices; tells whether `target` holds probabilities."""
    for name, t in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"input: expected one of {FLOATS}, got {input.dtype}")
    if input.dim() == 0:
        raise RuntimeError("input: expected shape (D) or (..., D), got a 0-d tensor")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"linear_weight: expected shape (C, D) or (C, d1, ..., dK, D), got {tuple(linear_weight.shape)}"
        )
    C, *positions, D = linear_weight.shape
    if input.shape[-1] != D:
        raise RuntimeError(
            f"expected equal input and linear_weight last dimensions (in_features), got {input.shape[-1]} and {D}, "
            "respectively"
        )
    if positions and input.dim() == 1:
        raise RuntimeError(f"input: expected shape (N, D) for a linear_weight of shape (C, d1, ..., D), got ({D},)")
    if linear_bias is not None and linear_bias.shape != (C, *positions):
        raise RuntimeError(f"linear_bias: expected shape {(C, *positions)}, got {tuple(linear_bias.shape)}")
    others = (("linear_weight", linear_weight), ("linear_bias", linear_bias), ("target", target), ("weight", weight))
    for name, other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(f"{name}: expected a tensor on {input.device}, where input is, got {other.device}")
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, other in others[:2]:
        cast = autocast and other is not None and torch.float64 not in (input.dtype, other.dtype)
        if other is not None and other.dtype != input.dtype and not (cast and other.is_floating_point()):
            raise RuntimeError(f"{name}: expected dtype {input.dtype}, as input has, got {other.dtype}")
    batch = input.shape[:-1]
    is_probs = target.shape == (*batch, C, *positions)
    if is_probs:
        if not target.is_floating_point():
            raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    else:
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"target: expected dtype int64 or uint8 for class indices, got {target.dtype}")
        if batch and target.dim() and target.shape[0] != batch[0]:
            raise ValueError(f"Expected input batch_size ({batch[0]}) to match target batch_size ({target.shape[0]}).")
        if target.shape != (*batch, *positions) and not (not batch and target.numel() == 1 and target.dim() == 1):
            raise RuntimeError(
                f"target: expected size {(*batch, *positions)} for an input of size {tuple(input.shape)} and a "
                f"linear_weight of size {tuple(linear_weight.shape)}, got {tuple(target.shape)}"
            )
    if weight is not None:
        _check_weight(input, weight, C, is_probs or autocast)
    return is_probs


def check_memory_budget(memory_budget: int | None) -> None:
    if memory_budget is not None and (isinstance(memory_budget, bool) or not isinstance(memory_budget, int)):
        raise TypeError(f"memory_budget: expected a number of bytes, an int, or None, got {memory_budget!r}")


def check_token_weight(token_weight: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if token_weight is None:
        return
    if token_weight.shape != shape:
        raise ValueError(f"token_weight: expected shape {tuple(shape)}, as target, got {tuple(token_weight.shape)}")
    if not token_weight.is_floating_point():
        raise TypeError(f"token_weight: expected a floating-point dtype, got {token_weight.dtype}")
    if token_weight.device != device:
        raise RuntimeError(f"token_weight: expected a tensor on {device}, where input is, got {token_weight.device}")


def check_inplace(x: Tensor) -> None:
    """Overwriting needs every element to have memory of its own."""
    spaced = 0
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=operator.itemgetter(1)):
        if size > 1:
            if stride <= spaced:
                raise ValueError(
                    f"inplace_backward: expected an input whose elements do not share memory, got strides "
                    f"{x.stride()} for shape {tuple(x.shape)}; pass input.contiguous()"
                )
            spaced += (size - 1) * stride
