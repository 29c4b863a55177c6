"""The losses as modules: the same results as the functions, PyTorch's names and state, a head's weight from outside."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import (
    FusedCrossEntropyLoss,
    FusedDistillationLoss,
    FusedLinearCrossEntropyLoss,
    FusedLinearDistillationLoss,
    FusedTopKDistillationLoss,
    fused_distillation_loss,
    fused_linear_cross_entropy,
    fused_linear_distillation_loss,
    fused_top_k_distillation_loss,
)


def test_the_module_of_logits(backend, device):
    x, target = 3 * torch.randn(6, 40, device=device), torch.randint(0, 40, (6,), device=device)
    weight = torch.rand(40, device=device)
    target[2] = target[0]
    options = {"ignore_index": int(target[0]), "reduction": "sum", "label_smoothing": 0.2}
    ours = FusedCrossEntropyLoss(weight, backend=backend, **options)
    torch.testing.assert_close(ours(x, target), F.cross_entropy(x, target, weight, **options))
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert "label_smoothing=0.2" in repr(ours)
    assert list(ours.state_dict()) == ["weight"]


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_of_hidden_states(bias, backend, device):
    module = FusedLinearCrossEntropyLoss(
        8, 20, out_features=(3,), bias=bias, weight=torch.rand(20), ignore_index=[1, 2], softcap=9.0, backend=backend,
        dtype=torch.float32, device=device, z_loss=0.1, reduction="sum", label_smoothing=0.1, logit_scale=0.5,
        memory_budget=10**7,
    )  # fmt: skip
    h, y = torch.randn(5, 8, device=device), torch.randint(0, 20, (5, 3), device=device)
    linear = module.linear
    expected = fused_linear_cross_entropy(
        h, linear.weight.view(20, 3, 8), y, linear_bias=linear.bias.view(20, 3) if bias else None,
        weight=module.weight, ignore_index=[1, 2], softcap=9.0, z_loss=0.1, reduction="sum", label_smoothing=0.1,
        logit_scale=0.5, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(module(h, y), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(8, 20, out_features=(3,), bias=bias, weight=torch.rand(20))
        theirs.load_state_dict(module.state_dict())
    assert "softcap=9.0" in repr(module)
    with pytest.raises(ValueError, match="options"):
        FusedLinearCrossEntropyLoss(8, 20, options=object())
    with pytest.raises(RuntimeError, match="label_smoothing"):
        FusedLinearCrossEntropyLoss(8, 20, label_smoothing=2.0)


class Tied(torch.nn.Module):
    """A model whose head is its embedding."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 8)
        self.criterion = FusedLinearCrossEntropyLoss(8, 20, external_weight=True, **options)

    def forward(self, ids, target, **more):
        return self.criterion(self.embedding(ids), target, linear_weight=self.embedding.weight, **more)


def test_a_head_s_weight_from_outside(backend, device):
    """Tied embeddings are one parameter. It is in the state_dict once, and gets the gradients of both of its uses."""
    model = Tied(ignore_index=[1], z_loss=0.1, backend=backend).to(device)
    assert list(model.state_dict()) == ["embedding.weight"]
    ids, y = torch.randint(0, 20, (2, 5), device=device), torch.randint(0, 20, (2, 5), device=device)
    weight, bias = model.embedding.weight, torch.randn(20, device=device, requires_grad=True)
    ours = model(ids, y, linear_bias=bias)
    true = fused_linear_cross_entropy(
        F.embedding(ids, weight), weight, y, linear_bias=bias, ignore_index=1, z_loss=0.1, backend=backend
    )
    assert torch.equal(ours, true)
    for one, other in zip(
        torch.autograd.grad(ours, (weight, bias)), torch.autograd.grad(true, (weight, bias)), strict=True
    ):
        torch.testing.assert_close(one, other)
    model.double()  # the next call gets the weight that replaces the embedding's
    assert model(ids, y).dtype == torch.float64


def test_a_head_s_weight_is_either_the_module_s_or_from_outside(device):
    h, y = torch.randn(3, 8), torch.tensor([1, 2, 3])
    outside = FusedLinearCrossEntropyLoss(8, 20, external_weight=True)
    with pytest.raises(ValueError, match=r"linear_weight: expected shape \(20, 8\).*external_weight=True, got None"):
        outside(h, y)
    with pytest.raises(ValueError, match=r"linear_weight: expected shape \(20, 8\).*got \(19, 8\)"):
        outside(h, y, linear_weight=torch.randn(19, 8))
    with pytest.raises(ValueError, match="linear_weight, linear_bias: expected None.*external_weight=True"):
        FusedLinearCrossEntropyLoss(8, 20)(h, y, linear_weight=torch.randn(20, 8))
    with pytest.raises(ValueError, match="bias: expected False with external_weight=True, got True; pass linear_bias"):
        FusedLinearCrossEntropyLoss(8, 20, bias=True, external_weight=True)


@pytest.mark.parametrize(
    ("module", "function", "teacher"),
    [
        (FusedDistillationLoss, fused_distillation_loss, lambda: [torch.randn(3, 5)]),
        (FusedLinearDistillationLoss, fused_linear_distillation_loss, lambda: [torch.randn(3, 7), torch.randn(5, 7)]),
        (
            FusedTopKDistillationLoss,
            fused_top_k_distillation_loss,
            lambda: [torch.arange(6).view(3, 2) % 5, torch.full((3, 2), 0.3).log()],
        ),
    ],
    ids=["logits", "linear", "top k"],
)
def test_modules_of_distillation(module, function, teacher):
    options = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "alpha": 0.6, "ignore_index": [4, 3]}
    criterion = module(reduction="sum", **options)
    of_student = [torch.randn(3, 5)] if module is FusedDistillationLoss else [torch.randn(3, 4), torch.randn(5, 4)]
    tensors, target = [*of_student, *teacher()], torch.tensor([1, 4, 0])
    weights = {"token_weight": torch.rand(3)}
    expected = function(*tensors, target, reduction="sum", **options, **weights)
    torch.testing.assert_close(criterion(*tensors, target, **weights), expected)
    assert "beta=0.3" in repr(criterion)
    assert "softcap" not in repr(criterion)
    assert [*criterion.state_dict()] == []
    assert "temperature" in inspect.signature(module).parameters
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        module(temperatur=2.0)
    for wrong in ({"temperature": 0.0}, {"divergence": "kl"}, {"reduction": "max"}, {"backend": "cuda"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            module(**wrong)
