"""Kernels of other libraries, compiled and counted beside this project's, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from unittest import mock

import torch

from bench.speed.providers import TRL_CHUNK

from .cases import Case

#: Rows per call. Both libraries do more than launch (Liger reads its targets on the host, TRL multiplies matrices), so
#: their tensors need memory, and rows are few.
ROWS = 16


def liger(case: Case, arch: int | str) -> None:
    """Liger's only launch. It reads a row for its sums, and again for its gradient, which it writes over the logits."""
    from liger_kernel.ops import cross_entropy  # type: ignore[import-untyped]  # has no annotations

    x = torch.empty(case.T, case.V, dtype=getattr(torch, case.dtype), requires_grad=True)
    target = torch.zeros(case.T, dtype=torch.int64)
    has = set(case.features)
    # The number of warps depends on the device's generation, which Liger would ask for.
    family = "blackwell" if isinstance(arch, int) and arch >= 100 else "hopper"
    with mock.patch.object(cross_entropy, "infer_device_arch", return_value=family):
        cross_entropy.cross_entropy_forward(
            x, target, torch.ones(case.V) if "weight" in has else None, -100, 0.0,
            0.1 if "smoothing" in has else 0.0, "mean", 30.0 if "softcap" in has else None, False,
            "stats" in has, "stats" in has,
        )  # fmt: skip


def trl(case: Case, arch: int | str) -> None:
    """TRL's log-probabilities of a linear layer, tile by tile, with or without its statistics."""
    from trl.kernels import chunked_logprob

    hidden = torch.zeros(case.T, 8, dtype=getattr(torch, case.dtype), requires_grad=True)
    weight = torch.zeros(case.V, 8, dtype=hidden.dtype)
    target = torch.zeros(case.T, dtype=torch.int64)
    outputs = chunked_logprob.OPTIONAL_OUTPUTS if "stats" in case.features else ()
    softcap = 30.0 if "softcap" in case.features else None
    with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
        log_probs, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, min(TRL_CHUNK, case.V), softcap, 1.0, outputs
        )
        if case.operation == "backward":
            log_probs.sum().backward()


#: By library, the function that calls its own launcher, on tensors that suffice for a null driver.
LIBRARIES: dict[str, Callable[[Case, int | str], None]] = {"liger_kernel": liger, "trl": trl}


def installed(library: str) -> bool:
    if library == "trl":
        return bool(find_spec("trl")) and find_spec("trl.kernels") is not None
    return find_spec(library) is not None


def every(V: int, dtypes: tuple[str, ...] = ("bfloat16",)) -> list[Case]:
    """Liger's launch and TRL's two, forward and backward, if the libraries are installed."""
    found = []
    for dtype in dtypes:
        for features in ((), ("softcap",), ("smoothing",), ("stats",)):
            found.append(Case("one pass", 1, ROWS, V, dtype, features, library="liger_kernel"))
        found.append(Case("forward", 1, ROWS, V, dtype, (), library="trl"))
        found.append(Case("forward", 1, ROWS, V, dtype, ("stats",), library="trl"))
        found.append(Case("backward", 1, ROWS, V, dtype, (), library="trl"))
    return [case for case in found if installed(case.library)]
