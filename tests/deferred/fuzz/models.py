"""The models that programs run on: tiny ones of random weights, each with its own kind of head."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from fused_ignore_ce import defer_logits
from fused_ignore_ce.hf import fusion_report, patch_model

from ...helpers.hf_tiny import llama

B, T, V, D = 2, 3, 11, 8


class Config(PretrainedConfig):
    model_type = "fuzzed"


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (torch.tanh(self.mix(self.embed(input_ids))),)


class Tiny(PreTrainedModel):
    """A backbone of two layers and a head; `after` is what the forward does to the logits."""

    config_class = Config

    def __init__(self, head: nn.Module, after: Any = None) -> None:
        super().__init__(Config())
        self.model = Backbone()
        self.lm_head = head
        self.after = after
        self.label_smoothing = 0.0

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids)[0])
        if self.after is not None:
            logits = self.after(logits)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, V), labels.view(-1), label_smoothing=self.label_smoothing)
        return CausalLMOutput(loss=loss, logits=logits)


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class GPT(nn.Module):
    """A model that somebody wrote himself, with nothing of transformers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Backbone()
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.lm_head(self.model(input_ids)[0])
        return Output(None if labels is None else F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits)


class Product(torch.autograd.Function):
    """What a quantized head does: a product whose weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None


class FrozenHead(nn.Linear):
    """A frozen product, by an `autograd.Function` or under `no_grad`, and a trainable bias and adapter after it."""

    def __init__(self, by_function: bool) -> None:
        super().__init__(D, V, bias=False)
        self.by_function = by_function
        self.weight.requires_grad_(False)
        self.adapter = nn.Linear(D, V)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.by_function:
            return Product.apply(hidden, self.weight) + self.adapter(hidden)
        with torch.no_grad():
            product = F.linear(hidden, self.weight)
        return product + self.adapter.bias


def _where(logits: Tensor) -> Tensor:
    return torch.where(logits > -1.5, logits, logits * 0.5)


def _capped(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 3.0) * 3.0


def _frozen(by_function: bool) -> nn.Module:
    model = Tiny(FrozenHead(by_function))
    model.model.requires_grad_(False)
    return model


def _tied() -> nn.Module:
    model = Tiny(nn.Linear(D, V, bias=False))
    model.lm_head.weight = model.model.embed.weight
    return model


def _llama() -> nn.Module:
    return llama(vocab_size=V, hidden_size=D, intermediate_size=D)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: Tiny(nn.Linear(D, V, bias=False)),
    "bias": lambda: Tiny(nn.Linear(D, V)),
    "tied": _tied,
    "capped": lambda: Tiny(nn.Linear(D, V, bias=False), _capped),
    "where": lambda: Tiny(nn.Linear(D, V, bias=False), _where),
    "frozen function": lambda: _frozen(True),
    "frozen no_grad": lambda: _frozen(False),
    "llama": _llama,
    "gpt": GPT,
}


@functools.cache
def _pristine(name: str, dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # logits of size 1 to 5, and no two alike
            parameter.copy_(torch.randn(parameter.shape) * (0.7 if parameter.dim() > 1 else 0.5))
    model = model.to(device, dtype).train()
    return model


def build(name: str, dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    """A fresh copy of a model."""
    return copy.deepcopy(_pristine(name, dtype, device, seed))


def patched(model: nn.Module, **options: Any) -> nn.Module:
    """The model with deferred logits, by the function that it needs."""
    if isinstance(model, GPT):
        defer_logits(model.lm_head, **options)
        return model
    return patch_model(model, **options)


def reads(model: nn.Module) -> dict[str, int]:
    """What has made the logits of a patched model be computed, with counts."""
    report = fusion_report(model)
    on_logits = {f"loss on logits: {kind}": count.calls for kind, count in report.on_logits.items()}
    return dict(report.reads) | on_logits
