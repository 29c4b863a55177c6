"""A vocabulary that is sharded over the ranks of a process group: the ranks' agreement and the sums over all shards.

A forward has two collectives, and a backward of the logits loss has none. The first tells every rank the sizes of all
shards and what went wrong on any of them. The second exchanges, per row, the partial sums that the kernels compute for
a block of the vocabulary (see `kernels/forward.py`). The ranks' shards are such blocks, and every rank merges them in
the same order, so that all return the same bits.
"""

from __future__ import annotations

import builtins
import zlib
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ..backends.protocol import Backend, Parts
from ..core.eager import PACKAGE, is_tracing
from ..core.options import LossOptions, ignored_ids, out_of_bounds
from ..core.rows import Block, Logits, Rows
from ..core.tensors import check_indices

# Renamed in torch 2.13.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of this name. Operators take groups by name."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]  # private; it takes a str


class Shard(NamedTuple):
    """The part of the vocabulary that this rank has."""

    group: dist.ProcessGroup
    block: Block


class _Header(NamedTuple):
    """What every rank sends to the others before it computes."""

    failed: int  # 1 if the rank met an error
    size: int  # classes of its shard
    rows: int
    lowest: int  # the lowest target that is not ignored
    highest: int  # the highest of them
    targets: int  # checksum of the targets
    call: int  # checksum of the arguments that must be the same on all ranks


def agree(group: str, size: int, target: Tensor | None, ignore_index: int, rows: int, call: Any) -> Shard:
    """The first collective: this rank's place among the shards, or the same error on all ranks.

    `target` are class indices (N,), `call` is whatever has to be equal on all ranks.
    """
    ranks = group_named(group)
    device = _device(ranks) if target is None else target.device
    header = _Header(0, size, rows, lowest=0, highest=-1, targets=0, call=zlib.crc32(repr(call).encode()))
    packed = torch.tensor(header, device=device)
    if target is not None and rows:
        kept = target != ignore_index
        packed[3] = torch.where(kept, target, torch.iinfo(torch.int64).max).min()
        packed[4] = torch.where(kept, target, torch.iinfo(torch.int64).min).max()
        # The sum may wrap around, alike on all ranks. The positions as factors make permuted targets differ.
        packed[5] = (target * torch.arange(1, rows + 1, device=device)).sum()
    headers = _exchange_headers(ranks, packed.to(_device(ranks)))
    sizes = [header.size for header in headers]
    classes = sum(sizes)
    for rank, header in enumerate(headers):
        bad = header.lowest if header.lowest < 0 else header.highest
        if header.lowest <= header.highest and not 0 <= bad < classes:
            raise IndexError(
                f"{out_of_bounds(bad, classes, ignore_index)}; it came on rank {rank} of the process group"
            )
    _check_same(headers, "rows", "numbers of rows")
    _check_same(headers, "call", "arguments or dtypes", show=False)
    _check_same(headers, "targets", "targets", show=False)
    return Shard(ranks, Block(sum(sizes[: dist.get_rank(ranks)]), classes))


def _check_same(headers: list[_Header], field: str, name: str, show: bool = True) -> None:
    values = [getattr(header, field) for header in headers]
    if len(set(values)) > 1:
        differing = next(rank for rank, value in enumerate(values) if value != values[0])
        shown = f": {values}" if show else ""
        raise ValueError(
            f"process_group: expected the same {name} on all ranks, rank {differing} differs from rank 0{shown}; a "
            "sharded vocabulary needs replicated hidden states and targets, and equal options"
        )


class FailingTogether:
    """A context for what a rank does before the ranks agree: an error on one is raised on all, instead of a hang.

    Without a group, and while it is traced, it does nothing.
    """

    def __init__(self, group: str | None) -> None:
        self.group = None if group is None or is_tracing() else group_named(group)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.group is not None and isinstance(error, Exception):
            header = torch.zeros(len(_Header._fields), dtype=torch.int64, device=_device(self.group))
            header[0] = 1
            _exchange_headers(self.group, header, error)


def _exchange_headers(group: dist.ProcessGroup, header: Tensor, error: Exception | None = None) -> list[_Header]:
    headers = [_Header(*values) for values in _gather(group, header).tolist()]
    if any(header.failed for header in headers):
        messages: list[Any] = [None] * len(headers)
        dist.all_gather_object(messages, error and (type(error).__name__, str(error)), group)
        rank, (name, message) = next((rank, each) for rank, each in enumerate(messages) if each is not None)
        kind = getattr(builtins, name, RuntimeError)
        raise kind(f"{message} (on rank {rank} of the process group)") from error
    return headers


def _device(group: dist.ProcessGroup) -> torch.device:
    """The device on which headers are exchanged: of the same type on all ranks, and known without a tensor."""
    types = {device.type for device in group._device_types}
    return torch.device("cpu") if "cpu" in types else torch.device("cuda", torch.cuda.current_device())


def _gather(group: dist.ProcessGroup, t: Tensor) -> Tensor:
    """Gathers t from all ranks, as (ranks, *t.shape)."""
    gathered = t.new_empty(group.size() * t.numel())
    _all_gather(gathered, t.reshape(-1), group=group)
    return gathered.view(group.size(), *t.shape)


class Merged(NamedTuple):
    """The results of rows over all shards; the last two fields are empty where they do not apply."""

    rows: Rows
    target_weight: Tensor  # (N,) class weights of index targets
    likeliest: Tensor  # (N,) int64 class of the largest target probability, with statistics


def merge(
    kernels: Backend,
    shard: Shard,
    parts: Parts,
    targets: tuple[Tensor, Tensor | None, Tensor | None],
    options: LossOptions,
    with_stats: bool,
) -> Merged:
    """The second collective: exchanges the ranks' sums and returns the rows' results.

    `parts` are this rank's sums, and `targets` are (target (N,), class weights, probabilities (N, V)) of its shard.
    """
    target, weight, probs = targets
    partial, argmax = kernels.combine(parts, options)
    fields = list(partial[: 5 if with_stats else 4, 0])
    if with_stats:
        fields.append(_as_float(argmax[0], partial.dtype))
    if weight is not None and probs is None:
        fields.append(_weight_of_target(weight, target - shard.block.first_class).to(partial.dtype))
    if probs is not None and with_stats:
        largest, at = probs.detach().max(-1) if probs.shape[-1] else (probs.new_full(target.shape, -1.0), target)
        fields += [largest.to(partial.dtype), _as_float(at + shard.block.first_class, partial.dtype)]

    gathered = _gather(shard.group, torch.stack(fields)).transpose(0, 1).contiguous()  # (fields, ranks, N)
    rest = iter(gathered[5 if with_stats else 4 :])
    partial = gathered[:5] if with_stats else torch.cat([gathered[:4], torch.zeros_like(gathered[:1])])
    argmax = _as_integer(next(rest)) if with_stats else argmax.new_empty((partial.shape[1], 0))
    target_weight, likeliest = partial.new_empty(0), target.new_empty(0)
    if weight is not None and probs is None:
        target_weight = next(rest).sum(0)
    if probs is not None and with_stats:
        best = next(rest).argmax(0, keepdim=True)
        likeliest = _as_integer(next(rest)).gather(0, best).squeeze(0)
    rows = Rows(*kernels.merge(target, (partial, argmax), options, with_stats=with_stats))
    return Merged(rows, target_weight, likeliest)


def forward(
    kernels: Backend, group: str, logits: Logits, options: LossOptions, with_stats: bool
) -> tuple[Merged, Shard]:
    """The results of rows over all shards, from this rank's shard of the logits; also returns its place among them."""
    x, target, weight, probs = logits
    B, T, V = x.shape
    call = (x.dtype, tuple(options), with_stats, weight is None, probs is None)
    shard = agree(group, V, target if probs is None else None, options.ignore_index, B * T, call)
    parts = kernels.new_parts(x, 1, with_stats)
    kernels.forward_part(logits, options, parts=parts, part=0, block=shard.block, with_stats=with_stats)
    targets = (target, weight, None if probs is None else probs.reshape(B * T, V))
    return merge(kernels, shard, parts, targets, options, with_stats), shard


def _weight_of_target(weight: Tensor, local: Tensor) -> Tensor:
    """The class weights of targets among this shard's classes; 0 for a target of another shard."""
    here = (local >= 0) & (local < len(weight))
    if not len(weight):
        return torch.zeros_like(local, dtype=weight.dtype)
    return torch.where(here, weight[torch.where(here, local, 0)], 0.0)


def _as_float(classes: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of class ids as numbers of this dtype, so that they can be gathered along with sums."""
    return classes.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def _as_integer(bits: Tensor) -> Tensor:
    return bits.view(torch.int64 if bits.dtype == torch.float64 else torch.int32).long()


@torch.library.custom_op(f"{PACKAGE}::sum_over_ranks", mutates_args=())
def sum_over_ranks(t: Tensor, group: str) -> Tensor:
    """The sum of t over the ranks, in t's dtype; half precision is summed in float32."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32), copy=True).contiguous()
    dist.all_reduce(wide, group=group_named(group))
    return wide.to(t.dtype)


@sum_over_ranks.register_fake
def _(t: Tensor, group: str) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


class Replicated(torch.autograd.Function):
    """Identity in forward; all-reduces the gradient in backward."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(dt, ctx.group), None


def global_token_count(
    target: Tensor, group: dist.ProcessGroup | None = None, *, ignore_index: int | Collection[int] = -100
) -> Tensor:
    """The number of targets that are not ignored, over all ranks of a group whose ranks have tokens of their own.

    With it, ranks that have unequal numbers of ignored tokens compute the mean over all tokens:

        normalizer = global_token_count(target, group) / group.size()    # DDP and FSDP average gradients over ranks
        fused_cross_entropy(logits, target, normalizer=normalizer)

    Args:
        target: class indices of this rank, any shape.
        group: the data-, context- or sequence-parallel group; the default group if None.
        ignore_index: an id, or a collection of them, as the loss takes it.

    Returns:
        0-d int64 tensor on target's device, the same on all ranks. No host sync.

    Raises:
        TypeError: a target that holds no class indices.
    """
    if target.is_floating_point():
        check_indices(target)
    kept = torch.ones_like(target, dtype=torch.bool)
    for ignored in ignored_ids(ignore_index):
        kept &= target != ignored
    count = kept.sum()
    dist.all_reduce(count, group=group)
    return count
