"""A write between a compiled loss and its backward is an error, or changes nothing; it never changes the gradients."""

import pytest
import torch

from fused_ignore_ce import (
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_distillation_loss,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_linear_log_probs,
    fused_top_k_distillation_loss,
)

LOSSES = {
    "logits": lambda t, **k: fused_cross_entropy(t["x"], t["y"], token_weight=t["token_weight"], **k),
    "several ids": lambda t, **k: fused_cross_entropy(t["x"], t["y"], t["weight"], ignore_index=[-100, 2], **k),
    "images": lambda t, **k: fused_cross_entropy(t["images"], t["labels"], reduction="none", **k).sum(),
    "probabilities": lambda t, **k: fused_cross_entropy(t["x"], t["q"], **k),
    "causal": lambda t, **k: fused_causal_lm_loss(t["sequences"], None, shift_labels=t["labels"], **k),
    "linear": lambda t, **k: fused_linear_cross_entropy(t["h"], t["w"], t["labels"], linear_bias=t["b"], **k),
    "log-probabilities": lambda t, **k: fused_linear_log_probs(t["h"], t["w"], t["labels"], **k).sum(),
}
#: Distillation, which has no kernels.
DISTILLATIONS = {
    "distillation": lambda t: fused_distillation_loss(t["sequences"], t["teacher"], t["labels"], alpha=0.5),
    "linear distillation": lambda t: fused_linear_distillation_loss(t["h"], t["w"], t["h"] + 1, t["w"], t["labels"]),
    "rows of linear distillation": lambda t: fused_linear_distillation_loss(
        t["h"], t["w"], t["teacher"], t["v"], t["labels"], reduction="none"
    ),
    "top-k distillation": lambda t: fused_top_k_distillation_loss(
        t["h"], t["w"], t["ids"], t["log_p"], t["labels"], reduction="none"
    ),
}


def tensors(device):
    found = {
        "x": torch.randn(6, 5),
        "y": torch.tensor([0, 1, 2, 3, -100, 4]),
        "token_weight": torch.rand(6) + 0.1,
        "weight": torch.rand(5) + 0.1,
        "images": torch.randn(2, 5, 3),
        "labels": torch.tensor([[0, 1, 2], [3, -100, 4]]),
        "q": torch.rand(6, 5),
        "sequences": torch.randn(2, 3, 5),
        "h": torch.randn(2, 3, 4),
        "w": torch.randn(5, 4),
        "b": torch.randn(5),
        "teacher": torch.randn(2, 3, 5),
        "v": torch.randn(5, 5),
        "ids": torch.tensor([0, 3]).expand(2, 3, 2).clone(),
        "log_p": torch.full((2, 3, 2), -1.5),
    }
    return {name: t.to(device) for name, t in found.items()}


@pytest.mark.parametrize("loss", DISTILLATIONS.values(), ids=DISTILLATIONS)
def test_distillation(loss, device):
    test_never_in_silence(lambda t, backend: loss(t).sum(), "auto", device)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_never_in_silence(loss, backend, device):
    torch._dynamo.reset()
    given, reads = tensors(device), set()

    class Noting(dict):
        def __getitem__(self, name):
            reads.add(name)
            return super().__getitem__(name)

    def gradients(function, written):
        leaves = {n: t.clone().requires_grad_(t.is_floating_point() and n != "weight") for n, t in given.items()}
        used = {n: t * 1.0 if t.requires_grad else t for n, t in leaves.items()}
        value = function(used if written else Noting(used), backend=backend)
        if written:
            with torch.no_grad():
                used[written].copy_(used[written].flip(0))
        return torch.autograd.grad(value, [t for t in leaves.values() if t.requires_grad], allow_unused=True)

    expected = gradients(loss, None)
    compiled = torch.compile(loss, fullgraph=True)  # by Inductor
    for name in sorted(reads):
        try:
            found = gradients(compiled, name)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            for ours, true in zip(found, expected, strict=True):
                assert (ours is None) == (true is None)
                if ours is not None:
                    torch.testing.assert_close(ours, true)
