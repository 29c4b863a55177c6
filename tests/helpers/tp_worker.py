"""Functions with DTensors for `rank_worker.py`: losses, parallelised models, and ranks with tokens of their own."""

import os
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleOutput, parallelize_module

import fused_ignore_ce
from fused_ignore_ce.distributed import global_token_count

MESHES: dict = {}


def mesh_of(*shape):
    if shape not in MESHES:
        MESHES[shape] = init_device_mesh("cpu", shape)
    return MESHES[shape]


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def loss_of_dtensors(loss, tensors, placements, wanted=(), mesh=(4,), compiled=None, **options):
    """A loss of DTensors, and its gradients.

    `placements` has, for each tensor that becomes a DTensor, the dimension that each dimension of the mesh shards.
    """
    for name, dims in placements.items():
        given = [Replicate() if dim is None else Shard(dim) for dim in dims]
        tensors[name] = distribute_tensor(tensors[name], mesh_of(*mesh), given)
    tensors = {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}
    function = getattr(fused_ignore_ce, loss)
    if compiled:
        torch._dynamo.reset()
        torch.use_deterministic_algorithms(False)
        function = torch.compile(function, fullgraph=True, backend=compiled)
    try:
        found = function(**tensors, **options)
        (2 * found).sum().backward()
    except Exception as error:
        return {"error": (type(error).__name__, str(error))}
    finally:
        torch.use_deterministic_algorithms(True)
    grads = {name: tensors[name].grad for name in wanted}
    placed = {name: str(getattr(grad, "placements", "plain")) for name, grad in grads.items()}
    return {"loss": found.detach(), "placed": placed, **{name: whole(grad) for name, grad in grads.items()}}


HEADS = {
    "gathered": lambda: {"lm_head": ColwiseParallel(output_layouts=Replicate())},
    "replicated DTensor": lambda: {"lm_head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False)},
    "sharded DTensor": lambda: {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)},
    "sequence parallel": lambda: {
        "model.norm": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
}


def step_of_parallelized(model, head, batch, read=False, **options):
    """A step of a model whose head `parallelize_module` has sharded."""
    parallelize_module(model, mesh_of(4), HEADS[head]())
    return _patched_step(model, batch, read, options)


def step_by_own_plan(folder, batch, rank):
    """A step of a model that transformers shards by its own plan."""
    from transformers import AutoModelForCausalLM

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4")
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    return _patched_step(model, batch, True, {})


def _patched_step(model, batch, read, options):
    """Loss, whole gradients, how often the linear loss was called and logits were computed, and the logits if read."""
    from fused_ignore_ce.deferred import affine, product
    from fused_ignore_ce.hf import patch_model

    with (
        mock.patch.object(affine, "fused_linear_cross_entropy", wraps=affine.fused_linear_cross_entropy) as linear,
        mock.patch.object(product.Product, "logits", autospec=True, side_effect=product.Product.logits) as logits,
    ):
        outputs = patch_model(model, **options)(**batch)
        outputs.loss.backward()
    assert linear.call_args.args[1].shape[0] == model.config.vocab_size
    sharded = isinstance(linear.call_args.args[1], DTensor)
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    answer = {"loss": whole(outputs.loss).detach(), "grads": grads, "linear": linear.call_count, "sharded": sharded}
    answer["computed"] = logits.call_count
    if read:
        answer["logits"] = whole(outputs.logits + 0).detach()
    return answer


def count(target, ranks, **options):
    return global_token_count(target, None if ranks is None else dist.group.WORLD, **options)


def fully_sharded_step(model, batch, **options):
    """A step of FSDP2, each rank with its own tokens: the loss of all, gradients, and gathers of parameters."""
    from fused_ignore_ce.hf import patch_model

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    patch_model(model, **options)
    ranks = dist.get_world_size()
    normalizer = global_token_count(batch["labels"][:, 1:]) / ranks  # gradients are averaged over ranks
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = model(**batch, num_items_in_batch=normalizer).loss
        loss.backward()
    gathers = sum(event.count for event in profile.key_averages() if "allgather" in event.key)
    total = loss.detach() / ranks
    dist.all_reduce(total)
    return {"loss": total, "grads": {n: whole(p.grad) for n, p in model.named_parameters()}, "gathers": gathers}
