"""The tensors that this rank computes with: the caller's own, or its shards of them."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import Tensor

from ..core.tensors import LinearTensors, LogitsTensors, check_process_group


def is_distributed(process_group: Any, *tensors: Tensor | None) -> bool:
    """Whether the vocabulary may be sharded: over a given group, or because a tensor is a DTensor."""
    if process_group is not None:
        check_process_group(process_group)
        return True
    distributed_tensor = sys.modules.get("torch.distributed.tensor")
    return distributed_tensor is not None and any(isinstance(t, distributed_tensor.DTensor) for t in tensors)


def local_logits(process_group: Any, tensors: LogitsTensors, classes_dim: int = 1) -> Any:
    """A context that gives (group, tensors) of this rank; the group's name is None if the vocabulary is not sharded."""
    if not is_distributed(process_group, *tensors):
        return contextlib.nullcontext((None, tensors))
    from . import dtensor

    return dtensor.local_logits(process_group, tensors, classes_dim)


def local_linear(process_group: Any, tensors: LinearTensors) -> Any:
    """The counterpart of `local_logits` for a loss of hidden states."""
    if not is_distributed(process_group, *tensors[:-1]):
        return contextlib.nullcontext((None, tensors))
    from . import dtensor

    return dtensor.local_linear(process_group, tensors)
