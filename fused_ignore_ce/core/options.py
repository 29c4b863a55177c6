"""The options of a loss, as objects passed from caller to kernel. Of this package, it imports `eager.py` only."""

from __future__ import annotations

import math
import operator
import re
import types
import typing
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from .eager import is_tracing

Reduction = Literal["none", "mean", "sum"]
Backend = Literal["auto", "triton", "torch"]
REDUCTIONS: tuple[Reduction, ...] = typing.get_args(Reduction)
BACKENDS: tuple[Backend, ...] = typing.get_args(Backend)


class RowKeywords(TypedDict, total=False):
    """The keywords that every loss takes."""

    label_smoothing: float
    softcap: float | None
    logit_scale: float
    z_loss: float
    loss_dtype: torch.dtype | None
    zero_if_all_ignored: bool
    backend: str


class CausalLMKeywords(RowKeywords, total=False):
    """The options that `fused_causal_lm_loss` hands on to `fused_cross_entropy`."""

    weight: Tensor | None
    reduction: str
    token_weight: Tensor | None
    inplace_backward: bool
    grad_in_forward: bool
    return_stats: bool | Literal["differentiable"]
    process_group: Any


class CrossEntropyKeywords(RowKeywords, total=False):
    """The keywords of `fused_cross_entropy` that do not change the type of its result."""

    ignore_index: int | Collection[int] | None
    reduction: str
    token_weight: Tensor | None
    normalizer: float | Tensor | None
    inplace_backward: bool
    grad_in_forward: bool
    process_group: Any


class LinearCausalLMKeywords(RowKeywords, total=False):
    """The options that `fused_linear_causal_lm_loss` hands on to `fused_linear_cross_entropy`."""

    logits_dtype: torch.dtype | None
    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: str
    memory_budget: int | str | None
    process_group: Any


class LinearKeywords(RowKeywords, total=False):
    """The keywords of `fused_linear_cross_entropy` that do not change the type of its result."""

    linear_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int | Collection[int] | None
    reduction: str
    token_weight: Tensor | None
    normalizer: float | Tensor | None
    memory_budget: int | str | None
    logits_dtype: torch.dtype | None
    process_group: Any


class LossOptions(NamedTuple):
    """The scalar options of a loss. `ignore_index` is the one id that marks ignored rows in prepared targets."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0

    def checked(self) -> LossOptions:
        """The same options as plain numbers, or an error that names the one that is wrong."""
        _, label_smoothing, softcap, logit_scale, z_loss = self
        check_number("label_smoothing", label_smoothing)
        check_number("softcap", softcap)
        check_number("logit_scale", logit_scale)
        check_number("z_loss", z_loss)
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
        check_above_zero("softcap", softcap)
        return LossOptions(
            self.ignore_index,
            float(label_smoothing),
            None if softcap is None else float(softcap),
            float(logit_scale),
            float(z_loss),
        )


def check_number(name: str, value: Any) -> None:
    if is_tracing():  # numbers may be symbols
        return
    if (type(value) is float and math.isfinite(value)) or (value is None and name == "softcap"):
        return
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if math.isinf(value) or (math.isnan(value) and name in ("logit_scale", "z_loss")):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_above_zero(name: str, value: float | None) -> None:
    """Raises an error for a number that is not positive. A softcap may be None."""
    if value is not None and not value > 0.0:
        or_none = " or None" if name.endswith("softcap") else ""
        raise ValueError(f"{name}: expected a number above 0{or_none}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


class ReductionOptions(NamedTuple):
    """The options of the reduction from the losses of rows to the loss of the caller."""

    reduction: str = "mean"
    normalizer: float | Tensor | None = None
    return_stats: bool | str = False
    loss_dtype: torch.dtype | None = None
    zero_if_all_ignored: bool = False

    def checked(self) -> ReductionOptions:
        """The same options, or an error that names the one that is wrong."""
        reduction, normalizer, return_stats, loss_dtype, zero_if_all_ignored = self
        if reduction not in REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction: expected one of {REDUCTIONS}")
        if normalizer is not None:
            _check_normalizer(reduction, normalizer)
        if not isinstance(return_stats, bool) and return_stats != "differentiable":
            raise ValueError(f'return_stats: expected False, True or "differentiable", got {return_stats!r}')
        if loss_dtype is not None and not (isinstance(loss_dtype, torch.dtype) and loss_dtype.is_floating_point):
            raise TypeError(f"loss_dtype: expected a floating-point torch.dtype or None, got {loss_dtype!r}")
        check_flag("zero_if_all_ignored", zero_if_all_ignored)
        return self


def _check_normalizer(reduction: str, normalizer: Any) -> None:
    if reduction != "mean":
        raise ValueError(
            'normalizer: expected None, as it divides the sum of reduction="mean" only, got '
            f'{normalizer!r} with reduction="{reduction}"'
        )
    of_tensor = isinstance(normalizer, Tensor)
    if of_tensor and normalizer.dim() == 0:
        return
    if of_tensor or (not is_tracing() and (not hasattr(normalizer, "__float__") or isinstance(normalizer, bool))):
        got = f"shape {tuple(normalizer.shape)}" if of_tensor else repr(normalizer)
        kind = ValueError if of_tensor else TypeError
        raise kind(f"normalizer: expected a number or a 0-d tensor, got {got}")


def ignored_ids(ignore_index: int | Collection[int] | None) -> tuple[int, ...]:
    """`ignore_index` as a tuple of ints without repetitions; None means -100, as in `nn.LinearCrossEntropyLoss`."""
    if type(ignore_index) is int:
        return (ignore_index,)
    given: Any = -100 if ignore_index is None else ignore_index
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


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    check_above_zero("temperature", temperature)


def check_logits_dtype(logits_dtype: Any, dtype: torch.dtype | None = None) -> None:
    """Raises an error for a dtype that logits of these hidden states cannot have."""
    if logits_dtype is not None and (logits_dtype != torch.float32 or dtype == torch.float64):
        of = "" if dtype is None else f" for {dtype} hidden states"
        expected = "None" if dtype == torch.float64 else "None or torch.float32"
        raise ValueError(f"logits_dtype: expected {expected}{of}, got {logits_dtype!r}")


def check_backend(backend: str) -> None:
    check_choice("backend", backend, BACKENDS)


#: MB is 10^6 bytes, MiB is 2^20.
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def budget_bytes(memory_budget: int | str | None) -> int | None:
    """`memory_budget` as a number of bytes. A string may have a unit, in any case of letters.

    >>> budget_bytes("512MiB"), budget_bytes("0.5 GB"), budget_bytes("4096")
    (536870912, 500000000, 4096)
    """
    if memory_budget is None:
        return None
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool):
        if memory_budget < 0:
            raise ValueError(f"memory_budget: expected at least 0 bytes, got {memory_budget}")
        return memory_budget
    if isinstance(memory_budget, str):
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", memory_budget.strip().lower(), re.ASCII)
        if found and found[2] in _UNITS:
            return int(float(found[1]) * _UNITS[found[2]])
    raise TypeError(
        'memory_budget: expected a number of bytes, an int or a string such as "512MiB", with one of the units B, KB, '
        f"MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024), or None, got {memory_budget!r}"
    )


_DTYPES = {
    torch.bfloat16: ("bf16", "bfloat16"),
    torch.float16: ("fp16", "float16", "half"),
    torch.float32: ("fp32", "float32", "float"),
    torch.float64: ("fp64", "float64", "double"),
}


def floating_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    """The floating-point dtype that a string names, or the dtype itself; `name` is the argument in the error.

    >>> floating_dtype("dtype", "bf16")
    torch.bfloat16
    """
    if isinstance(dtype, str):
        for known, names in _DTYPES.items():
            if dtype.lower().removeprefix("torch.") in names:
                return known
    elif isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    spellings = ", ".join(spelling for names in _DTYPES.values() for spelling in names)
    raise TypeError(f"{name}: expected a floating-point torch.dtype, or one of {spellings}, got {dtype!r}")


def out_of_bounds(target: int, classes: int, ignore_index: int) -> str:
    """The message of an IndexError for a target that is neither a class nor ignored."""
    replaced = target == -100 != ignore_index
    hint = "; ignore_index replaces -100, it does not add to it: to ignore both, pass ignore_index=[-100, {}]"
    return (
        f"target {target} is out of bounds: expected a class in [0, {classes}) or ignore_index={ignore_index}"
        f"{hint.format(ignore_index) if replaced else ''}"
    )


# An operator of `torch.library` takes no objects: the fields of a call are flattened for it, options first.

_Call = TypeVar("_Call", bound=tuple[Any, ...])
_SCHEMA_TYPES = {int: "int", float: "float", bool: "bool", str: "str", torch.dtype: "ScalarType"}


def schema_of(call: type[tuple[Any, ...]]) -> str:
    """The operator schema of a NamedTuple's fields: its first field is a `LossOptions`, the others are scalars."""
    hints = {**typing.get_type_hints(LossOptions), **typing.get_type_hints(call)}
    del hints["options"]
    return ", ".join(f"{_schema_type(hint)} {name}" for name, hint in hints.items())


def _schema_type(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner, none = typing.get_args(hint)
        assert none is type(None)
        return f"{_SCHEMA_TYPES[inner]}?"
    return _SCHEMA_TYPES[hint]


def flatten(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """The scalars of a call, in the order of `schema_of`."""
    return (*call[0], *call[1:])


def unflatten(call: type[_Call], scalars: tuple[Any, ...]) -> _Call:
    """The call from its scalars."""
    count = len(LossOptions._fields)
    return call(LossOptions(*scalars[:count]), *scalars[count:])
