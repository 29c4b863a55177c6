"""Checks the tensors of all losses: an error says what was expected and what came.

Classes of errors follow `torch.nn.functional.cross_entropy`, so that code which catches its errors catches ours.
Nothing here looks at the values of a tensor, so nothing waits for the device.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager import autocasts

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(NamedTuple):
    """The sizes of logits (*batch, C, *positions)."""

    batch: torch.Size
    classes: int
    positions: torch.Size

    @property
    def rows(self) -> torch.Size:
        """The shape of the row losses, and of index targets."""
        return torch.Size((*self.batch, *self.positions))

    @property
    def logits(self) -> torch.Size:
        return torch.Size((*self.batch, self.classes, *self.positions))


class LogitsTensors(NamedTuple):
    """The tensors of a loss of logits, as the caller gave them or as this rank has them."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None


class LinearTensors(NamedTuple):
    """The tensors of a loss of hidden states, as the caller gave them or as this rank has them."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    token_weight: Tensor | None
    sum_dinput: bool = True  # whether the gradient of input has to be summed over the ranks


def holds_probabilities(target: Tensor) -> bool:
    """Whether a target holds class probabilities; it holds class indices otherwise."""
    return target.is_floating_point()


def rows_of(t: Tensor) -> Tensor:
    """The rows (N, C) of a tensor (..., C)."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def class_dimension(input: Tensor, classes_dim: int) -> int:
    """The dimension of logits that is the vocabulary: `classes_dim`, or the only one there is."""
    return min(classes_dim, input.dim() - 1) % max(input.dim(), 1)


def check_logits(input: Tensor, target: Tensor, weight: Tensor | None, *, classes_dim: int = 1) -> Sizes:
    """Checks logits (C) or (N, C, d1, ..., dK) and what belongs to them; returns their sizes.

    With `classes_dim=-1`, the logits are (..., C).
    """
    _check_tensors(input=input, target=target, weight=weight)
    _check_floats(input, target)
    if input.dim() == 0:
        raise RuntimeError("input: expected shape (C), (N, C) or (N, C, d1, ..., dK), got a 0-d tensor")
    _check_devices(input, target=target, weight=weight)
    at = class_dimension(input, classes_dim)
    sizes = Sizes(input.shape[:at], input.shape[at], input.shape[at + 1 :])
    _check_target(sizes, target, input)
    _check_weight(weight, input, sizes.classes, holds_probabilities(target))
    return sizes


def check_linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
) -> Sizes:
    """Checks input (..., D), linear_weight (C, d1, ..., dK, D) and what belongs to them; returns the logits' sizes."""
    _check_tensors(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    _check_floats(input, target)
    if input.dim() == 0:
        raise RuntimeError("input: expected shape (D) or (..., D), got a 0-d tensor")
    if linear_weight.dim() < 2:
        raise wrong_shape("linear_weight", "(C, D) or (C, d1, ..., dK, D)", linear_weight)
    C, *positions, D = linear_weight.shape
    if input.shape[-1] != D:
        transposed = linear_weight.dim() == 2 and input.shape[-1] == C
        raise RuntimeError(
            f"expected equal input and linear_weight last dimensions (in_features), got {input.shape[-1]} and {D}, "
            f"respectively{'; linear_weight has them first: pass linear_weight.T' if transposed else ''}"
        )
    if positions and input.dim() == 1:
        raise RuntimeError(f"input: expected shape (N, D) for a linear_weight of shape (C, d1, ..., D), got ({D},)")
    _check_devices(input, linear_weight=linear_weight, linear_bias=linear_bias, target=target, weight=weight)
    _check_operand("linear_weight", linear_weight, input)
    sizes = Sizes(input.shape[:-1], C, torch.Size(positions))
    _check_target(sizes, target, input, linear_weight)
    if linear_bias is not None:
        if linear_bias.shape != (C, *positions):
            raise wrong_shape("linear_bias", (C, *positions), linear_bias)
        _check_operand("linear_bias", linear_bias, input)
    _check_weight(weight, input, C, holds_probabilities(target))
    return sizes


def _check_tensors(**tensors: Any) -> None:
    for name, t in tensors.items():
        if not (t is None and name in ("linear_bias", "weight")):
            check_tensor(name, t)


def check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        hint = "; pass its weight" if isinstance(t, torch.nn.Module) else ""
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}{hint}")


def wrong_shape(name: str, expected: object, t: Tensor) -> RuntimeError:
    return RuntimeError(f"{name}: expected shape {expected}, got {tuple(t.shape)}")


def wrong_dtype(name: str, expected: torch.dtype, t: Tensor, where: str = "input") -> RuntimeError:
    return RuntimeError(f"{name}: expected dtype {expected}, as {where} has, got {t.dtype}")


def check_floating(name: str, t: Tensor, hint: str = "") -> None:
    if t.dtype not in FLOATS:
        raise NotImplementedError(f"{name}: expected one of {FLOATS}, got {t.dtype}{hint}")


def _check_floats(input: Tensor, target: Tensor) -> None:
    check_floating("input", input, "; input and target seem to be swapped" if target.is_floating_point() else "")


def _check_devices(input: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None:
            check_device(name, other, input.device)


def check_device(name: str, t: Tensor, device: torch.device, where: str = "input") -> None:
    if t.device != device:
        raise RuntimeError(f"{name}: expected a tensor on {device}, where {where} is, got {t.device}")


def check_indices(target: Tensor, error: type[Exception] = TypeError) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        cast = "" if target.is_floating_point() else "; pass target.long()"
        raise error(f"target: expected dtype int64 or uint8 for class indices, got {target.dtype}{cast}")


def _check_operand(name: str, operand: Tensor, input: Tensor) -> None:
    """Raises an error if an operand does not have input's dtype, unless autocast will cast it."""
    if operand.dtype == input.dtype:
        return
    casts = autocasts(input.device) and torch.float64 not in (input.dtype, operand.dtype)
    if not (casts and operand.is_floating_point()):
        raise wrong_dtype(name, input.dtype, operand)


def _check_target(sizes: Sizes, target: Tensor, input: Tensor, linear_weight: Tensor | None = None) -> None:
    if holds_probabilities(target):
        if target.shape != sizes.logits:
            raise RuntimeError(
                f"target: expected dtype int64 or uint8 for class indices, or class probabilities of size "
                f"{tuple(sizes.logits)}, got {target.dtype} of size {tuple(target.shape)}"
            )
        return
    if target.shape == sizes.logits:
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype}; pass "
            "target.to(input.dtype), or class indices without the dimension of classes"
        )
    check_indices(target, RuntimeError)
    if target.shape == sizes.rows or (not sizes.batch and target.dim() == 1 and target.numel() == 1):
        return
    if sizes.batch and target.dim() and target.shape[0] != sizes.batch[0]:
        raise ValueError(
            f"Expected input batch_size ({sizes.batch[0]}) to match target batch_size ({target.shape[0]})"
            f"{_likely_mistake(target, input, linear_weight)}"
        )
    of = f"an input of size {tuple(input.shape)}"
    if linear_weight is not None:
        of += f" and a linear_weight of size {tuple(linear_weight.shape)}"
    raise RuntimeError(
        f"target: expected size {tuple(sizes.rows)} for {of}, got {tuple(target.shape)}"
        f"{_likely_mistake(target, input, linear_weight)}"
    )


def _likely_mistake(target: Tensor, input: Tensor, linear_weight: Tensor | None) -> str:
    """A hint for sizes that do not fit, if the targets have as many elements as another tensor or dimension."""
    if linear_weight is None:
        if input.dim() < 3 or target.numel() != input.shape[:-1].numel():
            return ""
        return (
            "; the vocabulary seems to be input's last dimension: pass input.flatten(0, -2) and target.flatten(), or "
            "call fused_causal_lm_loss(logits, labels), which takes it there and shifts the labels"
        )
    if target.numel() != linear_weight.shape[:-1].numel():
        return ""
    return "; input and linear_weight seem to be swapped: pass the hidden states first, then the head's weight"


def _check_weight(weight: Tensor | None, input: Tensor, classes: int, any_dtype: bool) -> None:
    if weight is None:
        return
    if weight.shape != (classes,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        )
    any_dtype = any_dtype or autocasts(input.device)
    wide_weight = weight.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
    if not weight.is_floating_point() or not (any_dtype or wide_weight or weight.dtype == input.dtype):
        raise wrong_dtype("weight", input.dtype, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight: no gradient with respect to class weights is defined; pass weight.detach()")


def check_ignored(ids: tuple[int, ...], target: Tensor) -> None:
    """Refuses an ignored id of the vocabulary for probability targets, which have no class to compare it with."""
    if holds_probabilities(target) and any(i >= 0 for i in ids):
        raise RuntimeError(
            f"ignore_index is not supported for floating point target: expected it below 0, got {max(ids)}; leave it "
            "out, and give rows that count for nothing a token_weight of 0"
        )


def check_token_weight(token_weight: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if token_weight is None:
        return
    if token_weight.shape != shape:
        raise ValueError(f"token_weight: expected shape {tuple(shape)}, as target, got {tuple(token_weight.shape)}")
    if not token_weight.is_floating_point():
        raise TypeError(f"token_weight: expected a floating-point dtype, got {token_weight.dtype}")
    check_device("token_weight", token_weight, device)


def check_inplace(x: Tensor) -> None:
    """Raises an error if elements share memory, since the gradient could not overwrite them."""
    spaced = 0
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=operator.itemgetter(1)):
        if size > 1:
            if stride <= spaced:
                raise ValueError(
                    f"inplace_backward: expected an input whose elements do not share memory, got strides "
                    f"{x.stride()} for shape {tuple(x.shape)}; pass input.contiguous()"
                )
            spaced += (size - 1) * stride


def check_process_group(process_group: Any) -> None:
    if process_group is None:
        return
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed ProcessGroup or None, got {type(process_group).__name__}; "
            "for a DeviceMesh, pass mesh.get_group(dimension)"
        )
