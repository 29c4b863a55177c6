"""Tiny models of transformers, a batch for them, and what the tests of `patch_model` compare."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

V, D = 61, 16
TINY = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(cls=None, **config):
    torch.manual_seed(0)
    return (cls or transformers.LlamaForCausalLM)(transformers.LlamaConfig(**(TINY | config)))


def bert(name, **config):
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**TINY, **config)).eval()  # no dropout


def batch(classes=V, seed=0, shape=(2, 9)):
    g = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, V, shape, generator=g)
    labels = torch.randint(5, classes, shape, generator=g)
    labels[0, :6] = -100
    return {"input_ids": input_ids, "labels": labels}


def step(model, **inputs):
    """(outputs, gradients), with an upstream gradient that is not 1."""
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.loss * 0.5).backward()
    return outputs, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(ours, plain):
    outputs, grads = ours
    torch.testing.assert_close(outputs.loss, plain[0].loss)
    assert grads.keys() == plain[1].keys()
    for name, grad in grads.items():
        assert (grad is None) == (plain[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, plain[1][name], msg=lambda m, name=name: f"{name}: {m}")


class QuantizedHead(nn.Linear):
    """A head that does not call F.linear for its product."""

    def forward(self, hidden):
        return torch.einsum("btd,vd->btv", hidden, self.weight.round(decimals=2))


def with_head(head):
    def build():
        model = llama()
        torch.manual_seed(1)
        model.lm_head = head()
        return model

    return build
