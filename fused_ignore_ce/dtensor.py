"""From what callers hold, DTensors or a process group, to this rank's shards and the group's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .distributed import failing_together


def local_logits(
    loss: Callable[..., Any],
    process_group: dist.ProcessGroup | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *,
    classes_dim: int | None = None,
    **options: Any,
) -> Any:
    """`loss(input, target, weight, token_weight, group=..., **options)` of this rank's shards."""
    dim = min(1, input.dim() - 1) if classes_dim is None else classes_dim % input.dim()
    layout = _Layout("input", input, dim, process_group)
    is_probs = target.shape == input.shape
    return _together(
        layout.group,
        lambda: (
            layout.local(input),
            layout.shard(target, dim) if is_probs else _whole(target),
            layout.shard(weight, 0),
            _whole(token_weight),
        ),
        loss,
        **options,
    )


def local_linear(
    loss: Callable[..., Any],
    process_group: dist.ProcessGroup | None,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    **options: Any,
) -> Any:
    """`loss(input, linear_weight, target, linear_bias, weight, token_weight, group=..., **options)` of the shards."""
    layout = _Layout("linear_weight", linear_weight, 0, process_group)
    tokens_sharded = isinstance(input, DTensor) and any(not isinstance(p, Replicate) for p in input.placements)
    is_probs = target.dim() == input.dim() + linear_weight.dim() - 2
    return _together(
        layout.group,
        lambda: (
            layout.gathered(input) if tokens_sharded else layout.local(input),
            layout.local(linear_weight),
            layout.shard(target, input.dim() - 1) if is_probs else _whole(target),
            layout.shard(linear_bias, 0),
            layout.shard(weight, 0),
            _whole(token_weight),
        ),
        loss,
        sum_dinput=not tokens_sharded,
        **options,
    )


def _together(
    group: dist.ProcessGroup | None, tensors: Callable[[], tuple[Any, ...]], loss: Callable[..., Any], **options: Any
) -> Any:
    if group is None or group.size() == 1:
        return loss(*tensors(), **options)
    if torch.compiler.is_compiling():
        return loss(*tensors(), group=group.group_name, **options)
    with failing_together(group):
        return loss(*tensors(), group=group.group_name, **options)


class _Layout:
    """How a tensor, called `name` in errors, has dimension `dim`, the vocabulary, over the ranks.

    `group` is None if it is not sharded.
    """

    def __init__(self, name: str, t: Tensor, dim: int, group: dist.ProcessGroup | None) -> None:
        self.name, self.size, self.group = name, t.shape[dim], group
        self.mesh: Any = None
        self.mesh_dim: int | None = None
        if not isinstance(t, DTensor):
            return
        self.mesh = t.device_mesh
        sharded = [i for i, placement in enumerate(t.placements) if not isinstance(placement, Replicate)]
        if len(sharded) > 1 or any(not _is_shard(t.placements[i], dim, t.dim()) for i in sharded):
            raise NotImplementedError(
                f"{name}: expected a DTensor that is sharded on its vocabulary dimension {dim} over one dimension of "
                f"the mesh and replicated over the others, got {t.placements}; for tokens that are sharded, pass "
                "to_local() of every tensor and normalizer=distributed.global_token_count(target, group)"
            )
        if sharded:
            self.mesh_dim = sharded[0]
            self.group = self.mesh.get_group(sharded[0])
            if group not in (None, self.group):
                raise ValueError(f"process_group: expected None or the group {name} is sharded over, got another")

    def local(self, t: Tensor) -> Tensor:
        """The rank's part of the tensor whose layout it is, or of one that all ranks hold."""
        return t.to_local() if isinstance(t, DTensor) else t

    def shard(self, t: Tensor | None, dim: int) -> Tensor | None:
        """The rank's part of another tensor with a dimension of the vocabulary: as it is, or cut."""
        if t is None or self.mesh is None or self.mesh_dim is None:
            return t.to_local() if isinstance(t, DTensor) else t
        if not isinstance(t, DTensor):
            if t.shape[dim] != self.size:
                return t
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        placements = [Shard(dim) if i == self.mesh_dim else Replicate() for i in range(self.mesh.ndim)]
        return t.redistribute(placements=placements).to_local()

    def gathered(self, t: Any) -> Tensor:
        """All of a tensor that is sharded on its tokens, for shards of the vocabulary.

        It is gathered once, and its gradient, of which every rank has a share, goes back by one reduce-scatter.
        """
        if self.group is None or t.device_mesh != self.mesh or any(isinstance(p, Partial) for p in t.placements):
            raise NotImplementedError(
                f"input: expected a tensor that all ranks hold, or one sharded over the mesh that {self.name} is "
                f"sharded over, got {t.placements}; for tokens that are sharded and a {self.name} that is not, pass "
                "to_local() of every tensor and normalizer=distributed.global_token_count(target, group)"
            )
        partial = [Partial() if i == self.mesh_dim else Replicate() for i in range(t.device_mesh.ndim)]
        whole = t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)
        return whole.to_local(grad_placements=partial)


def _is_shard(placement: Any, dim: int, ndim: int) -> bool:
    return type(placement) is Shard and placement.dim % ndim == dim


def _whole(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, DTensor) else t
