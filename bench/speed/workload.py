"""The cases to measure, as data: sizes of models, variations of one shape, and the order of measurement."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

KINDS = ("logits", "linear")
DIRECTIONS = ("both", "forward", "backward")
SHARES = (0.0, 0.75, 0.5, 0.95)


#: The numbers of classes and features of models.
MODELS = {
    "Llama 3 8B": (128256, 4096),
    "Gemma 2 2B": (256000, 2304),
    "Qwen 2.5 0.5B": (151936, 896),
    "Qwen 3 8B": (151936, 4096),
    "GPT-2": (50257, 768),
}


class Case(NamedTuple):
    """Everything that a measurement depends on, except the loss. D is 0 for a loss of logits."""

    shape: str  # a model's name, "training", "base", or the size that is varied: "N", "V", "D"
    kind: str
    N: int
    V: int
    D: int
    ignored: float
    dtype: str
    direction: str

    def __str__(self) -> str:
        sizes = f"N{self.N}-V{self.V}" + (f"-D{self.D}" if self.D else "")
        return f"{self.shape}-{self.kind}-{sizes}-{self.dtype}-{self.ignored:.0%} ignored-{self.direction}"

    @property
    def kept(self) -> int:
        return self.N - round(self.N * self.ignored)


class Limits(NamedTuple):
    """What the plain path may cost. A shape is measured with the largest power of two of tokens within these limits."""

    tokens: int
    logits: int  # N V, for a loss of logits
    products: int  # N V D, for a loss of hidden states
    bytes: int  # what the plain path holds, including its operands

    def tokens_for(self, V: int, D: int) -> int:
        """The largest power of two of tokens within the limits, in bfloat16; 0 if not even one token is."""
        work = self.products // (V * D) if D else self.logits // V
        most = min(self.tokens, work, (self.bytes - 4 * V * D) // (16 * V + 4 * D))
        return 2 ** (most.bit_length() - 1) if most > 0 else 0


def limits(device: torch.device) -> Limits:
    """The limits of a device: on two CPU cores, under a second for the plain path; on CUDA, shapes as in training."""
    if device.type == "cuda":
        return Limits(8192, 2**33, 2**43, int(0.6 * torch.cuda.get_device_properties(device).total_memory))
    # Windows has no sysconf that tells how much memory there is.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    return Limits(8192, 2**26, 2**36, memory // 2)


class Base(NamedTuple):
    """The shape of which one size at a time is varied."""

    N: int
    V: int
    D: int


def case_of(shape: str, kind: str, sizes: Base, ignored: float, dtype: str, direction: str) -> Case:
    return Case(shape, kind, sizes.N, sizes.V, sizes.D if kind == "linear" else 0, ignored, dtype, direction)


#: On CUDA these are a model's sizes; on a CPU they are smaller in the same ratios.
BASES = {"cpu": Base(1024, 32768, 1024), "cuda": Base(8192, 131072, 4096)}
FACTORS = (0.25, 0.5, 2.0)

#: The shapes of training steps, measured on CUDA only, the most important first. Unlike other shapes, they are measured
#: even if the plain path has too little memory for them; a loss that runs out of memory is listed as left out.
TRAINING = [
    Base(N, V, D) for N in (8192, 16384) for V, D in ((128256, 4096), (32000, 4096), (151936, 4096), (248320, 2048))
]


def cases(device: torch.device) -> list[Case]:
    """All cases, the most important first, because a run whose time is up leaves out the last ones."""
    base = BASES[device.type]
    shapes = [("base", kind, base) for kind in KINDS]
    if device.type == "cuda":
        shapes += [("training", kind, sizes) for kind in KINDS for sizes in TRAINING]
    shapes += [(name, kind, sizes) for kind in KINDS for name, sizes in _models(kind, limits(device))]
    found = [
        case_of(*shape, ignored, "bfloat16", direction)
        for shape in shapes
        for direction, ignored in itertools.product(DIRECTIONS, SHARES)
    ]
    if device.type == "cpu":
        found += [case_of("base", "linear", base, ignored, "float32", "both") for ignored in SHARES]
    for kind, name, factor in itertools.product(KINDS, Base._fields, FACTORS):
        if (kind, name) != ("logits", "D"):
            sizes = base._replace(**{name: round(factor * getattr(base, name))})
            found.append(case_of(name, kind, sizes, 0.0, "bfloat16", "both"))
    return sorted(found, key=_importance)


def _models(kind: str, within: Limits) -> Iterator[tuple[str, Base]]:
    """The models' shapes. Among models whose losses have operands of the same sizes, only the first is measured."""
    first: dict[tuple[int, int], str] = {}
    for name, (V, D) in MODELS.items():
        first.setdefault((V, D if kind == "linear" else 0), name)
    for (V, D), name in first.items():
        if N := within.tokens_for(V, D):
            yield name, Base(N, V, D)


def _importance(case: Case) -> int:
    often, whole = case.ignored in SHARES[:2], case.direction == "both"
    if case.shape == "base":
        return 0 if whole and often and case.dtype == "bfloat16" else 2 if whole else 4
    if case.shape in Base._fields:
        return 3
    if case.shape == "training" and case.kind == "logits" and case.ignored == 0.0:
        return 1  # also forward and backward alone, which are compared with the roof
    return 1 if whole and often else 5 if whole else 6


#: The most random numbers that are drawn for a tensor.
DRAWN = 2**24 - 3


def tensors(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """(logits, target), or (hidden, weight, target) with logits of the order of 1. All but target require gradients."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> Tensor:
        """Repeats DRAWN numbers: a CPU takes longer to draw a model's head than to multiply with it."""
        some = torch.randn(min(math.prod(shape), DRAWN), device=device, dtype=dtype, generator=generator)
        return some.repeat(-(-math.prod(shape) // DRAWN))[: math.prod(shape)].view(shape)

    target = torch.randint(0, case.V, (case.N,), device=device, generator=generator)
    target[torch.randperm(case.N, device=device, generator=generator)[case.kept :]] = -100
    if not case.D:
        return random(case.N, case.V).requires_grad_(), target
    weight = random(case.V, case.D).div_(case.D**0.5)
    return random(case.N, case.D).requires_grad_(), weight.requires_grad_(), target
