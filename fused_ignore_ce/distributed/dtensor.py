"""Turns DTensors, or tensors with a process group, into this rank's shards and the name of the group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..core.tensors import LinearTensors, LogitsTensors, class_dimension, holds_probabilities
from .ranks import FailingTogether

#: What an error about a placement advises.
_TOKENS = (
    "for tokens that are sharded and a vocabulary that is not, pass to_local() of every tensor and "
    "normalizer=distributed.global_token_count(target, group)"
)


class LocalTensors:
    """A context that gives (group, tensors of this rank); an error inside it becomes the error of all ranks.

    The group's name is None where the vocabulary is not sharded.
    """

    def __init__(self, layout: _Layout, localize: Callable[[], Any]) -> None:
        sharded = layout.group is not None and layout.group.size() > 1
        self.group = layout.group.group_name if sharded and layout.group is not None else None
        self.localize = localize
        self.together = FailingTogether(self.group)

    def __enter__(self) -> tuple[str | None, Any]:
        self.together.__enter__()
        try:
            return self.group, self.localize()
        except Exception as error:
            self.together.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.together.__exit__(kind, error, trace)


def local_logits(process_group: dist.ProcessGroup | None, tensors: LogitsTensors, classes_dim: int) -> LocalTensors:
    """The rank's shards of logits, whose dimension `classes_dim` is the vocabulary, and of what belongs to them."""
    input, target, weight, token_weight = tensors
    dim = class_dimension(input, classes_dim)
    layout = _Layout("input", input, dim, process_group)
    is_probs = holds_probabilities(target)
    return LocalTensors(
        layout,
        lambda: LogitsTensors(
            _local(input),
            layout.shard(target, dim) if is_probs else _whole(target),
            layout.shard(weight, 0),
            _whole(token_weight),
        ),
    )


def local_linear(process_group: dist.ProcessGroup | None, tensors: LinearTensors) -> LocalTensors:
    """The rank's shards of a head and of what belongs to it, and all of the hidden states."""
    input, linear_weight, target, linear_bias, weight, token_weight, _ = tensors
    layout = _Layout("linear_weight", linear_weight, 0, process_group)
    tokens_sharded = isinstance(input, DTensor) and any(not isinstance(p, Replicate) for p in input.placements)
    is_probs = holds_probabilities(target)
    return LocalTensors(
        layout,
        lambda: LinearTensors(
            layout.gathered(input) if tokens_sharded else _local(input),
            _local(linear_weight),
            layout.shard(target, input.dim() - 1) if is_probs else _whole(target),
            layout.shard(linear_bias, 0),
            layout.shard(weight, 0),
            _whole(token_weight),
            sum_dinput=not tokens_sharded,
        ),
    )


class _Layout:
    """How the vocabulary, dimension `dim` of a tensor, is distributed over the ranks. Errors call the tensor `name`.

    `group` is None if it is not sharded.
    """

    def __init__(self, name: str, t: Tensor, dim: int, group: dist.ProcessGroup | None) -> None:
        self.name, self.size, self.group = name, t.shape[dim] if t.dim() else 0, group
        self.mesh: Any = None
        self.mesh_dim: int | None = None
        if not isinstance(t, DTensor):
            return
        self.mesh = t.device_mesh
        sharded = [i for i, placement in enumerate(t.placements) if not isinstance(placement, Replicate)]
        if len(sharded) > 1 or any(not _is_shard(t.placements[i], dim, t.dim()) for i in sharded):
            raise NotImplementedError(
                f"{name}: expected a DTensor that is sharded on its vocabulary dimension {dim} over one dimension of "
                f"the mesh and replicated over the others, got {t.placements}; {_TOKENS}"
            )
        if sharded:
            self.mesh_dim = sharded[0]
            self.group = self.mesh.get_group(sharded[0])
            if group not in (None, self.group):
                raise ValueError(f"process_group: expected None or the group {name} is sharded over, got another")

    def shard(self, t: Tensor | None, dim: int) -> Any:
        """The rank's part of another tensor, whose dimension `dim` is the vocabulary; a whole tensor is cut."""
        if t is None or self.mesh is None or self.mesh_dim is None:
            return _local(t)
        if not isinstance(t, DTensor):
            if t.shape[dim] != self.size:
                return t
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        placements = [Shard(dim) if i == self.mesh_dim else Replicate() for i in range(self.mesh.ndim)]
        return t.redistribute(placements=placements).to_local()

    def gathered(self, t: Any) -> Any:
        """All of a tensor that is sharded on its tokens, for shards of the vocabulary.

        It is gathered once, and its gradient, of which every rank has a share, goes back by one reduce-scatter.
        """
        if self.group is None or t.device_mesh != self.mesh or any(isinstance(p, Partial) for p in t.placements):
            raise NotImplementedError(
                f"input: expected a tensor that all ranks hold, or one sharded over the mesh that {self.name} is "
                f"sharded over, got {t.placements}; {_TOKENS}"
            )
        partial = [Partial() if i == self.mesh_dim else Replicate() for i in range(t.device_mesh.ndim)]
        whole = t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)
        return whole.to_local(grad_placements=partial)


def _is_shard(placement: Any, dim: int, ndim: int) -> bool:
    return type(placement) is Shard and placement.dim % ndim == dim


def _local(t: Tensor | None) -> Any:
    """The rank's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def _whole(t: Tensor | None) -> Any:
    """All of a tensor."""
    return t.full_tensor() if isinstance(t, DTensor) else t
