"""The measured cases, as data: sizes of models, variations of one shape, and the order in which they are measured."""

from __future__ import annotations

import itertools
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DIRECTIONS = ("both", "forward", "backward")
SHARES = (0.0, 0.75, 0.5, 0.95)


class Model(NamedTuple):
    name: str
    V: int
    D: int


MODELS = (
    Model("Llama 3 8B", 128256, 4096),
    Model("Gemma 2 2B", 256000, 2304),
    Model("Qwen 2.5 0.5B", 151936, 896),
    Model("Qwen 3 8B", 151936, 4096),
    Model("GPT-2", 50257, 768),
)


class Case(NamedTuple):
    """Everything that a measurement depends on, except the loss. D is 0 where the loss is of logits."""

    shape: str  # a model's name, "training", or what is varied: "base", "N", "V", "D"
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
    logits: int  # N V, where the loss is of logits
    products: int  # N V D, where it is of hidden states
    bytes: int  # what the plain path holds, including its operands

    def fits(self, N: int, V: int, D: int, itemsize: int) -> bool:
        held = (12 + 2 * itemsize) * N * V + 2 * itemsize * (N + V) * D
        work = N * V * D <= self.products if D else N * V <= self.logits
        return N <= self.tokens and work and held <= self.bytes

    def tokens_for(self, V: int, D: int, itemsize: int) -> int:
        """The largest power of two of tokens that fits; 0 where not even one token does."""
        fitting = (1 << i for i in range(self.tokens.bit_length()) if self.fits(1 << i, V, D, itemsize))
        return max(fitting, default=0)

    def __str__(self) -> str:
        return (
            f"tokens: the largest power of two up to {self.tokens} for which the plain path takes at most "
            f"{self.logits / 1e6:.0f} M logits (loss of logits) or {self.products / 1e9:.0f} G multiply-adds a matrix "
            f"product (linear loss), and {self.bytes / 2**30:.0f} GiB"
        )


def limits(device: torch.device) -> Limits:
    """The shapes by device: the plain path takes under a second on two cores; on CUDA they are those of training."""
    if device.type == "cuda":
        return Limits(8192, 2**33, 2**43, int(0.6 * torch.cuda.get_device_properties(device).total_memory))
    return Limits(8192, 2**26, 2**36, _memory() // 2)


def _memory() -> int:
    """The host's memory in bytes."""
    if not hasattr(os, "sysconf"):  # Windows
        return 8 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Base(NamedTuple):
    """The shape of which one size at a time is varied."""

    N: int
    V: int
    D: int


#: By device and kind. On CUDA these are a model's sizes; on a CPU they are smaller in the same ratios.
BASES = {
    ("cpu", "logits"): Base(1024, 32768, 0),
    ("cpu", "linear"): Base(1024, 32768, 1024),
    ("cuda", "logits"): Base(8192, 131072, 0),
    ("cuda", "linear"): Base(8192, 131072, 4096),
}
FACTORS = (0.25, 0.5, 2.0)


#: Training steps that a GPU has room for: (N, V, D), the most important first. Unlike other shapes, they are measured
#: whether or not the plain path has memory for them; a loss that has none is listed as left out.
TRAINING = {
    "cuda": tuple(
        Base(N, V, D)
        for N in (8192, 16384)
        for V, D in ((128256, 4096), (32000, 4096), (151936, 4096), (248320, 2048))
    ),
    "cpu": (),
}  # fmt: skip


def cases(device: torch.device) -> list[Case]:
    """All cases, the most important first: a run whose time is up leaves out the end."""
    within = limits(device)
    models: list[Case] = []
    base: list[Case] = []
    swept: list[Case] = []
    training: list[Case] = []
    for kind in ("logits", "linear"):
        for name, V, D in MODELS:
            if kind == "logits" and V in {case.V for case in models}:
                continue  # a model with the same logits is measured already
            D = D if kind == "linear" else 0
            N = within.tokens_for(V, D, 2)
            models += [Case(name, kind, N, V, D, *rest) for rest in _rest("bfloat16") if N]
        for N, V, D in TRAINING[device.type]:
            training += [
                Case("training", kind, N, V, D if kind == "linear" else 0, *rest) for rest in _rest("bfloat16")
            ]
        at = BASES[device.type, kind]
        base += [Case("base", kind, *at, *rest) for rest in _rest("bfloat16")]
        if kind == "linear" and device.type == "cpu":
            base += [Case("base", kind, *at, *rest) for rest in _rest("float32") if rest[-1] == "both"]
        for name, factor in itertools.product(at._fields, FACTORS):
            sizes = at._replace(**{name: round(getattr(at, name) * factor)})
            swept += [Case(name, kind, *sizes, 0.0, "bfloat16", "both")] * bool(getattr(at, name))

    return sorted(base + training + models + swept, key=_importance)


def _importance(case: Case) -> int:
    often, whole = case.ignored in SHARES[:2], case.direction == "both"
    if case.shape == "base":
        return 0 if whole and often and case.dtype == "bfloat16" else 2 if whole else 4
    if case.shape in Base._fields:
        return 3
    if case.shape == "training" and case.kind == "logits" and case.ignored == 0.0:
        return 1  # forward alone and backward alone, too: they are compared with the roof
    return 1 if whole and often else 5 if whole else 6


def _rest(dtype: str) -> list[tuple[float, str, str]]:
    return [(share, dtype, direction) for direction, share in itertools.product(DIRECTIONS, SHARES)]


#: How many random numbers are drawn for a tensor.
DRAWN = 2**24 - 3


def tensors(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """(logits, target), or (hidden, weight, target) with logits of the order of 1; all but target want gradients."""
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
