"""Kernels of other libraries, compiled beside this project's for predictions, where the libraries are installed."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from bench.packages import trl, version

from .cases import Case

#: Rows per call. Both libraries do more than launch (Liger reads its targets on the host, TRL multiplies matrices), so
#: their tensors need memory, and rows are few.
ROWS = 16


def call_liger(case: Case, arch: int | str) -> None:
    """Liger's only launch. It reads a row for its sums, and again for its gradient, which it writes over the logits."""
    from liger_kernel.ops import cross_entropy

    x = torch.empty(case.T, case.V, dtype=getattr(torch, case.dtype), requires_grad=True)
    target = torch.zeros(case.T, dtype=torch.int64)
    # The number of warps depends on the device's generation, which Liger would ask for.
    family = "blackwell" if isinstance(arch, int) and arch >= 100 else "hopper"
    with mock.patch.object(cross_entropy, "infer_device_arch", return_value=family):
        cross_entropy.cross_entropy_forward(x, target, None, -100, 0.0, 0.0, "mean", None, False, False, False)


def call_trl(case: Case, arch: int | str) -> None:
    """TRL's log-probabilities of a linear layer, tile by tile."""
    hidden = torch.zeros(case.T, 8, dtype=getattr(torch, case.dtype), requires_grad=True)
    weight = torch.zeros(case.V, 8, dtype=hidden.dtype)
    with mock.patch("trl.kernels.chunked_logprob._use_triton", return_value=True):
        log_probs, *_ = trl()(hidden, weight, torch.zeros(case.T, dtype=torch.int64))
        if case.operation == "backward":
            log_probs.sum().backward()


#: By library, the function that calls its own launcher, on tensors that suffice for a null driver.
LIBRARIES: dict[str, Callable[[Case, int | str], None]] = {"liger_kernel": call_liger, "trl": call_trl}


def every(V: int) -> list[Case]:
    """Liger's launch and TRL's two, forward and backward, if the libraries are installed."""
    launches = {"liger_kernel": ("one pass",), "trl": ("forward", "backward")}
    return [
        Case(operation, 1, ROWS, V, library=library)
        for library, operations in launches.items()
        if version(library.replace("_", "-"))
        for operation in operations
    ]
