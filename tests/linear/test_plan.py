"""The choice of a plan: arithmetic on sizes that a reader can redo, and three plans that agree."""

import itertools

import pytest
import torch

from fused_ignore_ce import (
    FusedLinearCrossEntropyLoss,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
    fused_linear_log_probs,
    plan_linear_loss,
)
from fused_ignore_ce.core.options import budget_bytes
from fused_ignore_ce.linear import calls, plan
from fused_ignore_ce.linear.plan import LinearPlan, Sizes

LLAMA = (8192, 128256, 4096)  # N, V, D
MIB = 2**20


def sizes(N, V, D, dtype=torch.bfloat16, device="cuda", **changed):
    fields = {"input_dtype": dtype, "weight_dtype": dtype, "dinput": True, "dweight": True, "gathered": False}
    return Sizes(N, V, D, dtype, device=device, recompute=False, probs=False, **(fields | changed))


def test_bytes_by_hand():
    """The sizes are for CUDA, where the loss of a tile needs no temporaries."""
    N, V, D = LLAMA
    rows = N * plan.ROW_BYTES
    assert sizes(N, V, D).bytes(N, V) == N * V * 2 + rows
    # An accumulator of dW in float32, and for vocabulary blocks one of dH, and the sums of every block.
    assert sizes(N, V, D).bytes(1024, V) == 1024 * V * 2 + 4 * V * D + rows
    assert sizes(N, V, D).bytes(N, 8016) == N * 8016 * 2 + 4 * N * D + N * 16 * plan.PART_BYTES + rows
    # No accumulator where the gradient itself is float32, as under autocast, but a bfloat16 copy of the weight.
    assert sizes(N, V, D, weight_dtype=torch.float32).bytes(1024, V) == 1024 * V * 2 + 2 * V * D + rows
    assert sizes(N, V, D, dweight=False).bytes(1024, V) == 1024 * V * 2 + rows
    # The kept rows of input, and of its gradient, where some are ignored.
    assert sizes(N, V, D, gathered=True).bytes(N, V) == N * V * 2 + 2 * 2 * N * D + rows
    assert sizes(N, V, D, gathered=True, dinput=False).bytes(N, V) == N * V * 2 + 2 * N * D + rows


def test_the_leanest_within_5_percent_of_the_fastest():
    N, V, D = 4 * LLAMA[0], LLAMA[1], LLAMA[2]
    of = sizes(N, V, D)
    chosen = plan_linear_loss(N, V, D)
    tiles = [(N // k, V) for k in range(1, 40)] + [(N, V // k) for k in range(2, 40)]
    fastest = min(of.seconds(*tile) for tile in tiles)
    assert of.seconds(*chosen.tile(N, V)) <= plan.NEAR_ENOUGH * fastest
    assert all(of.bytes(*tile) >= 0.95 * chosen.bytes for tile in tiles if of.seconds(*tile) <= 1.04 * fastest)
    assert chosen.bytes == of.bytes(*chosen.tile(N, V))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_budget_is_kept_and_less_is_never_faster(dtype, device):
    N, V, D = 4096, 50257, 512
    times = []
    for mib in (10**6, 1024, 512, 256, 128, 96, 64):
        try:
            chosen = plan_linear_loss(N, V, D, dtype=dtype, device=device, memory_budget=mib * MIB)
        except ValueError:
            continue
        assert chosen.bytes <= mib * MIB
        operand = plan.operand_dtype(dtype, torch.device(device))
        of = sizes(N, V, D, operand, device, input_dtype=dtype, weight_dtype=dtype)
        times.append(of.seconds(*chosen.tile(N, V), chosen.kept))
    assert len(times) >= 3
    assert all(later >= earlier / plan.NEAR_ENOUGH for earlier, later in itertools.pairwise(times))


def test_a_small_budget_on_llama_takes_vocabulary_blocks():
    """The budget has no room for a float32 accumulator of dW, which token chunks need unless the head is frozen."""
    assert plan_linear_loss(*LLAMA, memory_budget=512 * MIB).plan == "vocabulary blocks"
    frozen = plan_linear_loss(*LLAMA, memory_budget=512 * MIB, weight_grad=False)
    assert frozen.plan == "token chunks"


def test_ignored_tokens_are_not_planned_for():
    all_kept, quarter = plan_linear_loss(*LLAMA), plan_linear_loss(*LLAMA, num_ignored=LLAMA[0] * 3 // 4)
    assert all_kept.plan == quarter.plan == "one block"
    assert quarter.chunk == LLAMA[0] // 4
    assert quarter.bytes < all_kept.bytes / 3


def test_what_is_planned_is_what_runs(device, monkeypatch):
    """The loss takes the plan that `plan_linear_loss` returns for the same sizes."""
    asked = []
    original = plan.choose

    def recording(of, memory_budget):
        asked.append(original(of, memory_budget))
        return asked[-1]

    monkeypatch.setattr(calls, "choose", recording)
    h, w = torch.randn(100, 64, device=device, requires_grad=True), torch.randn(3000, 64, device=device)
    y = torch.randint(0, 3000, (100,), device=device)
    y[:40] = -100
    for reduction in ("mean", "none"):
        for budget in (2**19, 2**21, None):
            asked.clear()
            fused_linear_cross_entropy(h, w, y, memory_budget=budget, reduction=reduction).sum().backward()
            expected = plan_linear_loss(
                100, 3000, 64, num_ignored=40, dtype=torch.float32, device=device, memory_budget=budget,
                weight_grad=False, reduction=reduction,
            )  # fmt: skip
            assert asked[-1] == expected


def test_all_plans_agree(backend, device, monkeypatch):
    """Results agree up to rounding, also with chunks and blocks that do not divide the sizes."""
    N, V, D = 11, 37, 5
    h = torch.randn(N, D, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(V, D, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randint(0, V, (N,), device=device)
    found = []
    for name, chunk in (
        ("one block", N), ("token chunks", 1), ("token chunks", 4), ("token chunks", 10), ("vocabulary blocks", 1),
        ("vocabulary blocks", 16), ("vocabulary blocks", 36),
    ):  # fmt: skip
        forced = LinearPlan(name, chunk, 0)
        monkeypatch.setattr(calls, "choose", lambda *_, forced=forced: forced)
        loss, stats = fused_linear_cross_entropy(
            h, w, y, memory_budget=1, label_smoothing=0.1, return_stats=True, backend=backend
        )
        found.append((loss, *stats, *torch.autograd.grad(loss, (h, w))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


def test_a_budget_may_be_a_string():
    """MB is 10^6 bytes, MiB 2^20; a bare M, which some read as the one and some as the other, is refused."""
    meant = {
        "512MiB": 512 * MIB,
        "512 mb": 512 * 10**6,
        "0.5GiB": 512 * MIB,
        ".5 GB": 5 * 10**8,
        "1.5kib": 1536,
        "7": 7,
    }
    for text, number in meant.items():
        assert budget_bytes(text) == number
    assert plan_linear_loss(*LLAMA, memory_budget="512MiB") == plan_linear_loss(*LLAMA, memory_budget=512 * MIB)
    for wrong in ("1 apple", "MiB", "", "1e400", "nan", 1.5, True, "1MiBs", "512M", "-1MiB", "1_0"):
        with pytest.raises(TypeError, match="memory_budget: expected a number of bytes.*MB.*powers of 1000.*MiB"):
            budget_bytes(wrong)


def test_a_dtype_may_be_a_string():
    spellings = {
        torch.bfloat16: ("bf16", "bfloat16", "torch.bfloat16"), torch.float16: ("fp16", "float16", "half"),
        torch.float32: ("fp32", "float32", "float"), torch.float64: ("fp64", "float64", "double"),
    }  # fmt: skip
    for dtype, names in spellings.items():
        for name in (*names, names[0].upper()):
            for argument in ("dtype", "weight_dtype"):
                assert plan_linear_loss(*LLAMA, **{argument: name}) == plan_linear_loss(*LLAMA, **{argument: dtype})
    for argument in ("dtype", "weight_dtype"):
        for wrong in ("int8", "", torch.int64, 16):
            with pytest.raises(TypeError, match=f"^{argument}: expected a floating-point torch.dtype, or one of bf16"):
                plan_linear_loss(*LLAMA, **{argument: wrong})


def test_a_string_reaches_the_plan_from_everywhere(monkeypatch, device):
    asked = []
    original = calls.choose
    monkeypatch.setattr(calls, "choose", lambda of, memory_budget: asked.append(memory_budget) or original(of, None))
    h, y = torch.randn(1, 8, 4, device=device, requires_grad=True), torch.randint(0, 9, (1, 8), device=device)
    w = torch.randn(9, 4, device=device, requires_grad=True)
    for call in (
        lambda **o: fused_linear_cross_entropy(h, w, y, **o),
        lambda **o: fused_linear_log_probs(h, w, y, **o),
        lambda **o: fused_linear_causal_lm_loss(h, w, y, **o),
        lambda **o: FusedLinearCrossEntropyLoss(4, 9, device=device, **o)(h, y),
    ):
        asked.clear()
        call(memory_budget="2 KiB")
        assert set(asked) == {2048}


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"num_tokens": -5}, ValueError),
        ({"num_ignored": 9}, ValueError),
        ({"memory_budget": "1 apple"}, TypeError),
        ({"memory_budget": 1.5}, TypeError),
        ({"reduction": "avg"}, ValueError),
        ({"dtype": torch.int32}, TypeError),
    ],
    ids=str,
)
def test_a_plan_needs_sensible_sizes(changed, error):
    with pytest.raises(error, match=next(iter(changed))):
        plan_linear_loss(**({"num_tokens": 8, "num_classes": 10, "num_features": 4} | changed))
