"""Judges what a program showed on the patched model by what it showed on the plain one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interpreter import Observed

RIGHT, WRONG, RAISED, NOT_RAISED = (
    "right",
    "wrong in silence",
    "raised where plain does not",
    "did not raise where plain does",
)

#: Plain PyTorch's errors in a backward where a tensor that it needs was written to. Deferred logits may give the
#: gradient of the values at the time of the operation instead.
_WRITTEN_SINCE = ("modified by an inplace operation", "its base or another view of its base has been modified inplace")

_BACKWARD = ("backward", "autograd.grad", "trained(", "head_flops(")

#: Classes of errors that say nothing to a user, where plain PyTorch raises another one.
_UNCLEAR = (AttributeError, AssertionError, KeyError, NameError, RecursionError)


class Verdict(NamedTuple):
    verdict: str
    what: str = ""

    @property
    def right(self) -> bool:
        return self.verdict == RIGHT


def judge(
    ours: Observed, plain: Observed, dtype: str, refusals: tuple[str, ...] = (), leniencies: tuple[str, ...] = ()
) -> Verdict:
    """The first difference between two lists of observations.

    `refusals` are parts of the messages of errors that are right where the plain model raises none, and `leniencies` of
    those that only the plain model may raise. What follows such an error is not compared, unless a value was read.

    Floating-point numbers may differ by rounding errors, relative to the largest number of their tensor, and to a
    hundred-thousandth of the largest number of the program: gradients that cancel are made of large addends.
    """
    if dtype == "float64" and not any(map(_is_single, (v for _, v in plain))):
        relative, floor = 1e-10, 1e-13
    else:
        relative, floor = 1e-4, 1e-6
    floor *= max([1.0, *(_size(v) for label, v in plain if label.startswith(("value", "gradient", "calls")))])
    for i, (label, expected) in enumerate(plain):
        if i >= len(ours):
            return Verdict(WRONG, f"{label}: not seen")
        our_label, got = ours[i]
        if isinstance(got, Exception) and (label != our_label or not isinstance(expected, Exception)):
            if not any(refusal in str(got) for refusal in refusals):
                return Verdict(RAISED, f"{our_label}: {_told(got)}")
            if label != our_label:
                return Verdict(RIGHT)
            continue
        if isinstance(expected, Exception) and not isinstance(got, Exception):
            lenient = (*_WRITTEN_SINCE, *leniencies) if any(text in label for text in _BACKWARD) else leniencies
            if any(text in str(expected) for text in lenient):
                return Verdict(RIGHT)
            return Verdict(NOT_RAISED, f"{label}: plain raises {_told(expected)}")
        if label != our_label:
            return Verdict(WRONG, f"{label} was expected, {our_label} seen")
        if isinstance(expected, Exception):
            if isinstance(got, _UNCLEAR) and type(got) is not type(expected):
                return Verdict(WRONG, f"{label}: {_told(got)}, plain raises {_told(expected)}")
        elif label.startswith("hidden states held"):
            if got > expected:
                return Verdict(WRONG, f"{label}: {got}, plain: {expected}")
        else:
            difference = _difference(got, expected, relative, floor)
            if difference:
                return Verdict(WRONG, f"{label}: {difference}")
    if len(ours) > len(plain):
        label, got = ours[len(plain)]
        return (
            Verdict(RAISED, f"{label}: {_told(got)}")
            if isinstance(got, Exception)
            else Verdict(WRONG, f"{label}: seen")
        )
    return Verdict(RIGHT)


def _is_single(value: Any) -> bool:
    """Whether a value is in single precision, or describes a tensor that is."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_single, value))
    return value.dtype == torch.float32 if isinstance(value, Tensor) else value == "torch.float32"


def _told(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e)[:200]}"


def _size(value: Any) -> float:
    """The largest finite number, at most a million."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not value.is_meta:
        return min(1e6, value.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item())
    if isinstance(value, (tuple, list)):
        return max((_size(v) for v in value), default=0.0)
    return 0.0


def _difference(got: Any, expected: Any, relative: float, floor: float) -> str:
    """What differs; empty if nothing does."""
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        return _between_tensors(got, expected, relative, floor)
    if isinstance(got, (tuple, list)) and isinstance(expected, (tuple, list)):
        if len(got) != len(expected):
            return f"{_shown(got)}, plain: {_shown(expected)}"
        different = (_difference(a, b, relative, floor) for a, b in zip(got, expected, strict=True))
        return next((d for d in different if d), "")
    if type(got) is type(expected) is float:
        return _between_tensors(torch.tensor(got), torch.tensor(expected), relative, floor)
    return "" if type(got) is type(expected) and got == expected else f"{_shown(got)}, plain: {_shown(expected)}"


def _between_tensors(got: Tensor, expected: Tensor, relative: float, floor: float) -> str:
    for of in (lambda t: tuple(t.shape), lambda t: t.dtype, lambda t: t.device.type):
        if of(got) != of(expected):
            return f"{of(got)}, plain: {of(expected)}"
    if expected.is_meta or not expected.numel():
        return ""
    if not expected.is_floating_point():
        wrong = (got != expected).sum().item()
        return f"{wrong} of {got.numel()} elements differ" if wrong else ""
    got, expected = got.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(
        got[~finite].nan_to_num(nan=0.0), expected[~finite].nan_to_num(nan=0.0)
    ):
        return f"{got.flatten()[:4].tolist()}, plain: {expected.flatten()[:4].tolist()} (NaN or infinite)"
    if not finite.any():
        return ""
    off, largest = (got - expected)[finite].abs().max().item(), expected[finite].abs().max().item()
    return f"off by {off:.3g} of {largest:.3g}" if off > relative * largest + floor else ""


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return (
            f"a tensor {tuple(value.shape)} of norm {value.double().norm().item():.3g}"
            if not value.is_meta
            else "a tensor"
        )
    return repr(value)[:200]
