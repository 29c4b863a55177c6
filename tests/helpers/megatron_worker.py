"""Megatron-core's small GPT on a CPU, in one process or as one of the ranks of `ranks.py`."""

import contextlib
from unittest import mock

import torch

V, SEQUENCE, BATCH = 96, 16, 2


@contextlib.contextmanager
def on_a_cpu():
    """Megatron asks CUDA for the device and for states of generators, which dropout of 0 does not need.

    Its norm of PyTorch refuses sequence parallelism, in which gradients of the norm's weights are parts on each rank.
    """
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def norm(cls, config, hidden_size, eps=1e-5, **_):
        return torch.nn.LayerNorm(hidden_size, eps)

    with (
        mock.patch.object(WrappedTorchNorm, "__new__", norm),
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.object(CudaRNGStatesTracker, "fork", return_value=contextlib.nullcontext()),
    ):
        yield


def step(code=None, *, tensor_parallel=1, sequence_parallel=False, tied=False, mtp=False, bf16=False):
    """The losses of all tokens, the gradients of this rank, and logits; with `code`, of the class that it defines."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=tensor_parallel, sequence_parallel=sequence_parallel,
        mtp_num_layers=1 if mtp else None, pipeline_dtype=torch.float32,
    )  # fmt: skip
    scope = {"FusedGPTModel": GPTModel}
    exec(code or "", scope)
    layer = get_gpt_layer_local_spec()
    mtp_block = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if mtp else None
    with on_a_cpu():
        torch.manual_seed(0)
        model = scope["FusedGPTModel"](
            config, layer, V, SEQUENCE, share_embeddings_and_output_weights=tied, position_embedding_type="rope",
            mtp_block_spec=mtp_block,
        )  # fmt: skip
        if bf16:
            model.bfloat16()
        ids = torch.arange(BATCH * SEQUENCE).mul(37).remainder(V).view(BATCH, SEQUENCE)
        mask = (torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % 5 != 0).float()
        labels = ids.roll(-1, 1)
        positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
        attention = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        if code:
            labels = labels.masked_fill(mask == 0, -100)
        losses = model(ids, positions, attention, labels=labels, loss_mask=mask) * mask
        (losses.sum() / mask.sum()).backward()
        with torch.no_grad():  # multi-token prediction needs labels
            logits = None if mtp else model(ids, positions, attention)
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}, logits
