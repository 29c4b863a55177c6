"""The calls of launchers whose kernels are compiled, as data.

A case is one call, of this project's launchers or of a peer's. Tensors have shapes and no memory, so a case of 2^31
logits costs as little as any. Cases that come to the same kernel are compiled once; see `bench.proofs.compiling`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from fused_ignore_ce.core.distillation import DistillationOptions
from fused_ignore_ce.core.options import LossOptions

DTYPES = ("bfloat16", "float16", "float32")

#: Shapes (B, T, V) of language models: many rows, and so few that each is split over several programs.
MODELS = ((1, 8192, 32000), (1, 8192, 128256), (1, 16, 128256))
MODEL_ROWS = {(T, V) for _, T, V in MODELS}

#: Rows (B, T) and vocabularies that lead to every tile that a launcher can choose. Kernels also differ by whether rows
#: start at multiples of 16 elements, of 8 or of neither, so there are vocabularies of each kind.
ROWS = ((1, 1), (1, 32), (3, 4), (4096, 1), (3, 1001), (1, 65536))
VOCABULARIES = sorted({v for power in range(19) for v in (2**power, 2**power - 1, 2**power - 8) if v > 0})

#: The operations of distillation. Their divergence is forward_kl unless a feature names another one.
DISTILLATION = ("distillation", "distillation gradient", "distillation backward")
DIVERGENCES = {"reverse": "reverse_kl", "jsd": "jsd"}

#: Those of a teacher that is known by its likeliest classes. With "hard", there are two temperatures.
TOP_K = ("top-k", "top-k backward")

#: Operations on logits of two dimensions, (B * T, V), of which a quick run compiles the fullest set alone.
OF_ROWS = (*DISTILLATION, *TOP_K)

#: The features that make a difference to an operation's launcher. With "gradients", everything that forward returns has
#: an upstream gradient. With "hard", a cross entropy is mixed into a divergence at temperature 2.
FEATURES = {
    "forward": ("weight", "smoothing", "scale", "softcap", "stats", "probs"),
    "part": ("weight", "smoothing", "scale", "softcap", "stats", "probs"),
    "merge": ("stats",),
    "backward": ("weight", "smoothing", "scale", "softcap", "probs", "gradients"),
    "one pass": ("weight", "smoothing", "scale", "softcap", "stats"),
    "on chip": ("weight", "smoothing", "scale", "softcap", "stats"),
    "reduce": ("weight", "gradients"),
    "scale": (),
    "distillation": ("reverse", "jsd", "hard", "softcap", "stats"),
    "distillation gradient": ("reverse", "jsd", "hard", "softcap", "stats"),
    "distillation backward": ("reverse", "jsd", "hard", "softcap"),
    "top-k": ("hard", "softcap", "stats"),
    "top-k backward": ("hard", "softcap"),
}


@dataclass(frozen=True)
class Case:
    """One call. If not `contiguous`, logits lie in memory as (B, V, T)."""

    operation: str
    B: int
    T: int
    V: int
    dtype: str = "bfloat16"
    features: tuple[str, ...] = ()
    contiguous: bool = True
    library: str = "fused_ignore_ce"

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def aligned(self) -> bool:
        """Whether every line along the contiguous dimension starts at a multiple of 16, which Triton specialises on."""
        return (self.V if self.contiguous else self.T) % 16 == 0

    @property
    def name(self) -> str:
        return f"{self.operation} {'+'.join(self.features) or 'plain'}"

    def __str__(self) -> str:
        layout = "" if self.contiguous else " strided"
        return f"{self.library} {self.name} {self.dtype} {self.B}x{self.T}x{self.V}{layout}"


def empty(case: Case, device: str) -> torch.Tensor:
    """Logits (B, T, V)."""
    dtype = getattr(torch, case.dtype)
    if case.contiguous:
        return torch.empty(case.B, case.T, case.V, dtype=dtype, device=device)
    # At least two rows wide, because with one row, classes would be contiguous.
    return torch.empty(case.B, case.V, max(case.T, 2), dtype=dtype, device=device)[..., : case.T].movedim(1, 2)


class Arguments:
    """The tensors and options of a call, as launchers take them. On the device "meta", tensors have no memory."""

    def __init__(self, case: Case, device: str = "meta") -> None:
        has = set(case.features)
        self.N = case.B * case.T
        self.x = empty(case, device)
        self.target = torch.empty(self.N, dtype=torch.int64, device=device)
        self.weight = self.x.new_empty(case.V) if "weight" in has else None
        self.probs = torch.empty_like(self.x) if "probs" in has else None
        self.stats = "stats" in has
        self.options = LossOptions(
            label_smoothing=0.1 if "smoothing" in has else 0.0,
            softcap=30.0 if "softcap" in has else None,
            logit_scale=0.5 if "scale" in has else 1.0,
        )
        self.values = self.x.new_empty(self.N, dtype=torch.float32)  # one per row
        self.scalar = self.values.new_empty(())
        every = self.values if "gradients" in has else None
        self.upstream = SimpleNamespace(
            dloss=self.values if every is not None or "probs" in has else self.scalar,
            dlse=every,
            dentropy=every,
            factor=self.scalar,
            token_weight=every,
        )

        self.distillation = DistillationOptions(
            self.options,
            next((name for feature, name in DIVERGENCES.items() if feature in has), "forward_kl"),
            temperature=2.0 if "hard" in has else 1.0,
            alpha=0.5 if "hard" in has else 1.0,
            teacher_softcap=self.options.softcap,
        )
        self.temperatures = (2.0, 1.0) if "hard" in has else (1.0,)
        self.pair = self.x.reshape(-1, case.V), (torch.empty_like(self.x).reshape(-1, case.V), None), self.target

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.x, self.target, self.weight, self.probs


def _forward(kernels: Any, a: Arguments) -> None:
    kernels.forward(a.inputs, a.options, with_stats=a.stats)


def _part(kernels: Any, a: Arguments) -> None:
    V = a.x.shape[2]
    parts = kernels.new_parts(a.x, 3, a.stats)
    kernels.forward_part(a.inputs, a.options, parts=parts, part=1, block=(V, 3 * V), with_stats=a.stats)


def _merge(kernels: Any, a: Arguments) -> None:
    kernels.merge(a.target, kernels.new_parts(a.x, 3, a.stats), a.options, with_stats=a.stats)


def _backward(kernels: Any, a: Arguments) -> None:
    norm = a.values.new_empty((3, a.N))
    dprobs = None if a.probs is None else torch.empty_like(a.probs)
    saved = kernels.Saved(norm, a.values)
    kernels.backward(a.upstream, a.inputs, saved, a.options, dx=torch.empty_like(a.x), dprobs=dprobs)


def _one_pass(kernels: Any, a: Arguments) -> None:
    if kernels.can_one_pass(a.x, a.probs):
        kernels.forward_backward(a.upstream, a.inputs, a.options, dx=a.x, dz=None, with_stats=a.stats)


def _reduce(kernels: Any, a: Arguments) -> None:
    kernels.reduce(
        (a.values,), (a.target, a.weight, a.upstream.token_weight, None), a.options, mean=True, out_dtype=a.x.dtype
    )


def _scale(kernels: Any, a: Arguments) -> None:
    kernels.scale(a.x, a.scalar, a.scalar)


def _distilled(kernels: Any, a: Arguments) -> None:
    _distiller(kernels).forward(*a.pair, a.distillation, with_stats=a.stats)


def _distilled_gradient(kernels: Any, a: Arguments) -> None:
    x, *_ = a.pair
    _distiller(kernels).forward_backward(a.values, *a.pair, a.distillation, dx=x, with_stats=a.stats)


def _distilled_backward(kernels: Any, a: Arguments) -> None:
    saved = a.values.new_empty((7, a.N))
    _distiller(kernels).backward(a.values, *a.pair, saved, a.distillation, dx=torch.empty_like(a.pair[0]))


def _others(kernels: Any, a: Arguments) -> None:
    x, _, target = a.pair
    _distiller(kernels, "top_k").forward(x, target, a.options, a.temperatures, with_stats=a.stats)


def _others_backward(kernels: Any, a: Arguments) -> None:
    x, _, target = a.pair
    sums = len(a.temperatures)
    factors, saved = a.values.new_empty((sums, a.N), dtype=torch.float64), a.values.new_empty((1 + sums, a.N))
    _distiller(kernels, "top_k").backward(factors, x, target, saved, a.options, a.temperatures, dx=x)


def _distiller(kernels: Any, name: str = "distillation") -> Any:
    """The launchers of distillation beside those of the cross entropy."""
    return import_module(f"{kernels.__package__}.{name}")


#: Every launcher, by the name of its operation.
OPERATIONS: dict[str, Callable[[Any, Arguments], None]] = {
    "forward": _forward,
    "part": _part,
    "merge": _merge,
    "backward": _backward,
    "one pass": _one_pass,
    "on chip": _one_pass,  # on a chip that can keep rows in shared memory
    "reduce": _reduce,
    "scale": _scale,
    "distillation": _distilled,
    "distillation gradient": _distilled_gradient,
    "distillation backward": _distilled_backward,
    "top-k": _others,
    "top-k backward": _others_backward,
}

#: The operations that read rows of logits, and the kernels that do.
ROW_OPERATIONS = {
    "forward": "forward_kernel",
    "part": "forward_kernel",
    "backward": "backward_kernel",
    "one pass": "one_pass_kernel",
    "on chip": "on_chip_kernel",
    "distillation": "distillation_kernel",
    "distillation gradient": "distillation_kernel",
    "distillation backward": "distillation_backward_kernel",
    "top-k": "others_kernel",
    "top-k backward": "others_backward_kernel",
}


def feature_sets(operation: str) -> list[tuple[str, ...]]:
    """The sets of features: none, each alone, and all together, with and without probabilities as targets."""
    return list(dict.fromkeys([(), *((feature,) for feature in FEATURES[operation]), *fullest(operation)]))


def fullest(operation: str) -> list[tuple[str, ...]]:
    """All features together, with and without probabilities as targets, or with every divergence.

    These sets take the most registers. The logit scale is left out, because a softcap absorbs it.
    """
    if operation in DISTILLATION:
        others = tuple(feature for feature in FEATURES[operation] if feature not in DIVERGENCES)
        return [("jsd", *others), ("reverse", *others), others]
    everything = tuple(feature for feature in FEATURES[operation] if feature not in ("scale", "probs"))
    return [everything, (*everything, "probs")] if "probs" in FEATURES[operation] else [everything]


def every(dtypes: tuple[str, ...], quick: bool) -> Iterator[Case]:
    """Models' shapes with every set of features, and all other shapes with the fullest sets.

    The one pass has few registers to spare with any feature, so all of its shapes come with every set. With `quick`,
    models' shapes come without features and with the fullest sets, and beside them there is one strided shape.
    Distillation then comes with the fullest set and one model's shape alone.
    """
    for operation, dtype in itertools.product(OPERATIONS, dtypes):
        sets = [(), *fullest(operation)] if quick else feature_sets(operation)
        sets = fullest(operation)[:1] if quick and operation in OF_ROWS else sets
        models = MODELS[:1] if quick and operation in OF_ROWS else MODELS
        for (B, T, V), features in itertools.product(models, sets):
            yield Case(operation, B, T, V, dtype, features)
        if operation not in ROW_OPERATIONS:
            continue
        if quick and operation in OF_ROWS:
            continue
        for features in feature_sets(operation) if operation == "one pass" and not quick else fullest(operation):
            yield Case(operation, 4, 65536, 32, dtype, features, contiguous=False)
            rows = (*ROWS, (1, 1001)) if operation in OF_ROWS else ROWS  # whose (B, T) are one dimension, N
            for (B, T), V, contiguous in itertools.product(() if quick else rows, VOCABULARIES, (True, False)):
                yield Case(operation, B, T, V, dtype, features, contiguous)
