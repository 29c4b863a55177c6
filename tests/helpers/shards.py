"""A problem whose vocabulary is sharded over ranks: its parts, and the loss of them on every rank."""

import itertools

import torch

N, V, D = 6, 23, 5
#: Classes of every rank: even, uneven, a rank without any, one with almost all.
SHARDS = {
    "2 even": (12, 11),
    "2 uneven": (20, 3),
    "2, one empty": (0, 23),
    "4 even": (6, 6, 6, 5),
    "4 uneven": (1, 13, 2, 7),
    "4, one empty": (5, 0, 11, 7),
}
IGNORED = {"none": (), "some": (1, 4), "all": tuple(range(N))}
#: The first is no class. The second is a class outside of rank 0's shard.
IGNORED_IDS = (-100, 21)


def parts(shards):
    """The slices of the vocabulary."""
    stops = list(itertools.accumulate(shards))
    return [slice(stop - size, stop) for stop, size in zip(stops, shards, strict=True)]


def problem(ignored="some", probs=False, weighted=False, dtype=torch.float32):
    """Logits, targets and class weights of the whole vocabulary; the first and the last class are targets."""
    tensors = {"input": torch.randn(N, V, dtype=dtype), "target": torch.randint(V - 2, (N,))}
    tensors["target"][0], tensors["target"][-1] = 0, V - 1
    for i, row in enumerate(IGNORED[ignored]):
        tensors["target"][row] = IGNORED_IDS[i % 2]
    if probs:
        tensors["target"] = torch.rand(N, V, dtype=dtype).softmax(1)
    if weighted:
        tensors["weight"] = torch.rand(V, dtype=dtype) + 0.5
    return tensors


def vocabulary_dim(name, t, loss):
    """The dimension of a tensor that is sharded, if one is."""
    if name == "input":
        return 1 if loss == "fused_cross_entropy" else None
    if name in ("target", "token_weight"):
        return 1 if t.dim() == 2 else None
    return 0


def run(ranks, loss, tensors, shards, **kwargs):
    """The loss on every rank's own tensors."""
    arguments = []
    for part in parts(shards):
        own = {}
        for name, t in tensors.items():
            dim = vocabulary_dim(name, t, loss)
            own[name] = t if dim is None else t.narrow(dim, part.start, part.stop - part.start).contiguous()
        arguments.append({"ranks": len(shards), "loss": loss, "tensors": own, **kwargs})
    return ranks.run("call", arguments)


def joined(name, found, tensors, loss):
    """A gradient of the whole tensor from the ranks' parts."""
    dim = vocabulary_dim(name, tensors[name], loss)
    if dim is not None:
        return torch.cat([f[name] for f in found], dim)
    assert all(torch.equal(f[name], found[0][name]) for f in found), f"d{name}: not the same bits on all ranks"
    return found[0][name]
