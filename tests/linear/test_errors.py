"""What the linear loss refuses, and how it says so."""

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import fused_linear_cross_entropy, fused_linear_log_probs, plan_linear_loss


def call(N=4, V=9, D=3, **changed):
    arguments = {
        "input": torch.randn(N, D),
        "linear_weight": torch.randn(V, D),
        "target": torch.randint(0, V, (N,)),
        **changed,
    }
    return fused_linear_cross_entropy(**arguments)


BAD = {
    "input is a list": ({"input": [1.0]}, TypeError, "input: expected a Tensor, got list"),
    "integer input": ({"input": torch.ones(4, 3, dtype=torch.int64)}, NotImplementedError, "input: expected one of"),
    "0-d input": ({"input": torch.tensor(1.0)}, RuntimeError, r"input: expected shape \(D\)"),
    "1-d weight": ({"linear_weight": torch.randn(3)}, RuntimeError, r"linear_weight: expected shape \(C, D\)"),
    "features": ({"linear_weight": torch.randn(9, 4)}, RuntimeError, "got 3 and 4"),
    "weight dtype": ({"linear_weight": torch.randn(9, 3).double()}, RuntimeError, "linear_weight: expected dtype"),
    "bias shape": ({"linear_bias": torch.randn(8)}, RuntimeError, r"linear_bias: expected shape \(9,\)"),
    "bias dtype": ({"linear_bias": torch.randn(9).half()}, RuntimeError, "linear_bias: expected dtype"),
    "batch": ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"batch_size \(4\)"),
    "target shape": ({"target": torch.zeros(4, 2, dtype=torch.int64)}, RuntimeError, "target: expected size"),
    "target dtype": ({"target": torch.zeros(4, dtype=torch.int32)}, RuntimeError, "target: expected dtype int64"),
    "integer probabilities": ({"target": torch.ones(4, 9).long()}, RuntimeError, "Expected floating point type"),
    "class weights": ({"weight": torch.ones(8)}, RuntimeError, "all 9 classes"),
    "class weights' dtype": ({"weight": torch.ones(9).double()}, RuntimeError, "weight: expected dtype"),
    "reduction": ({"reduction": "avg"}, ValueError, "avg is not a valid value for reduction"),
    "normalizer": ({"reduction": "sum", "normalizer": 3}, ValueError, "normalizer"),
    "smoothing": ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected"),
    "token_weight": ({"token_weight": torch.ones(5)}, ValueError, "token_weight: expected shape"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    "process_group": (
        {"process_group": object()},
        TypeError,
        "process_group: expected a torch.distributed ProcessGroup",
    ),
    "ids": ({"ignore_index": []}, ValueError, "ignore_index: expected at least one"),
    "ids with probabilities": ({"target": torch.rand(4, 9), "ignore_index": 2}, RuntimeError, "ignore_index"),
    "budget": ({"memory_budget": 1.5}, TypeError, "memory_budget: expected a number of bytes"),
    "misspelled": ({"label_smoothin": 0.1}, TypeError, "label_smoothin"),
    "positions without batch": (
        {"input": torch.randn(3), "linear_weight": torch.randn(9, 2, 3), "target": torch.zeros(2).long()},
        RuntimeError,
        "input: expected shape",
    ),
}


@pytest.mark.parametrize(("changed", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(changed, error, match):
    with pytest.raises(error, match=match):
        call(**changed)


@pytest.mark.parametrize("target", [9, -1, -101, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_target_out_of_range(target, reduction, backend, plan):
    """Nothing is read or written out of bounds. Another package corrupts its heap here."""
    y = torch.tensor([1, target, -100, 2])
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    with pytest.raises(IndexError, match=f"target {target} is out of bounds"):
        fused_linear_cross_entropy(h, w, y, reduction=reduction, backend=backend)
    with pytest.raises(IndexError, match="out of bounds"):
        fused_linear_log_probs(h, w, y, backend=backend)


def test_a_budget_that_nothing_meets_names_the_smallest_that_works():
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=r"memory_budget: expected at least (\d+) bytes") as error:
            plan_linear_loss(1024, 32768, 256, memory_budget=1000, device=device)
        least = int(str(error.value).split("at least ")[1].split()[0])
        assert plan_linear_loss(1024, 32768, 256, memory_budget=least, device=device).bytes <= least
        with pytest.raises(ValueError, match="memory_budget"):
            plan_linear_loss(1024, 32768, 256, memory_budget=least - 1, device=device)
    for reduction in ("mean", "none"):  # in forward, although "none" computes its gradients in backward
        with pytest.raises(ValueError, match="memory_budget: expected at least"):
            call(memory_budget=10, reduction=reduction)
    # bfloat16 dW over token chunks needs an accumulator that forward does not.
    N, V, D = 64, 2000, 300
    h, w = torch.randn(N, D, dtype=torch.bfloat16), torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
    sizes = {"dtype": torch.bfloat16, "device": "cpu", "input_grad": False, "reduction": "none"}
    with pytest.raises(ValueError, match="at least") as error:
        plan_linear_loss(N, V, D, memory_budget=0, **sizes)
    budget = int(str(error.value).split("at least ")[1].split()[0]) - 1
    plan_linear_loss(N, V, D, memory_budget=budget, **(sizes | {"weight_grad": False}))  # forward alone would fit
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        fused_linear_cross_entropy(h, w, torch.zeros(N, dtype=torch.int64), memory_budget=budget, reduction="none")


def test_dtypes_are_the_callers_to_match_without_autocast():
    h, w = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(9, 3)
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="linear_weight: expected dtype torch.bfloat16"):
        fused_linear_cross_entropy(h, w, y)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_cross_entropy(h, w, y)
        torch.testing.assert_close(loss, F.cross_entropy(F.linear(h, w).float(), y), rtol=1e-2, atol=0)
