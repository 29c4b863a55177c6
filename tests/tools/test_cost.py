"""`python -m fused_ignore_ce plan`: its arithmetic agrees with that by hand, and with peaks in fresh processes."""

import itertools
import sys

import pytest
import torch

from fused_ignore_ce.__main__ import main
from fused_ignore_ce.tools import cost

from ..helpers.paths import ROOT

MIB, GIB = 2**20, 2**30
N, V, D = 16384, 128256, 4096


def printed(capsys, *arguments):
    assert main(["plan", "--model-shape", f"{V}x{D}", "--tokens", str(N), *arguments]) == 0
    return capsys.readouterr().out


def test_the_issues_example(capsys):
    """Plain: 12 NV bytes less the gradients. Fused: 2 bytes per kept logit, and the kept rows of input and gradient."""
    out = printed(capsys, "--ignored", "0.75", "--dtype", "bf16")
    plain = 12 * N * V - 2 * (N + V) * D
    fused = 2 * 4096 * V + 2 * 2 * 4096 * D + 128 * 4096
    assert f"plain  {plain / GIB:6.2f} GiB" in out
    assert f"fused  {fused / GIB:6.2f} GiB" in out
    assert "16384 tokens, 4096 of them kept" in out
    assert f"{6 * N * V * D / 1e12:.4g} TFLOP" in out
    assert f"{6 * 4096 * V * D / 700e12 * 1e3:.3g} ms" in out
    assert "one block of 4096 tokens" in out


def test_a_rate_that_was_not_measured_says_so(capsys):
    assert "700 TFLOP/s (70% of an H100's data sheet, not measured)" in printed(capsys)
    assert "not measured" not in printed(capsys, "--device", "cpu")
    out = printed(capsys, "--tflops", "400")
    assert "400 TFLOP/s (as given)" in out
    assert f"{6 * N * V * D / 400e12 * 1e3:.3g} ms" in out


def test_a_budget_is_kept_and_costs_a_product(capsys):
    out = printed(capsys, "--memory-budget", "512MiB")
    assert "vocabulary blocks" in out
    assert f"{8 * N * V * D / 1e12:.4g} TFLOP" in out
    chosen = cost.linear_cost(N, V, D, memory_budget=512 * MIB)
    assert chosen.plan.bytes <= 512 * MIB
    assert chosen.flops == 8 * N * V * D
    assert chosen.plain_flops == 6 * N * V * D


def test_less_memory_takes_longer(capsys):
    """The table that is printed, and is on the page about memory."""
    costs = cost.curve(8192, V, D)
    for more, less in itertools.pairwise(costs):
        assert less.plan.bytes < more.plan.bytes
        assert more.flops <= less.flops
        assert more.seconds < less.seconds
    assert costs[0] == cost.linear_cost(8192, V, D)
    assert any(0 < c.plan.kept for c in costs)
    assert main(["plan", "--model-shape", f"{V}x{D}", "--tokens", "8192"]) == 0
    table = capsys.readouterr().out.partition(" with less memory")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == len(costs) + 1
    assert table in (ROOT / "docs" / "concepts" / "memory.md").read_text()


@pytest.mark.parametrize(
    ("option", "spelling", "same", "other"),
    [
        ("--memory-budget", "512MB", "512000000", "512MiB"),
        ("--memory-budget", "0.5 GiB", "536870912", "512MB"),
        ("--dtype", "bfloat16", "bf16", "half"),
        ("--dtype", "half", "fp16", "bf16"),
    ],
)
def test_spellings(capsys, option, spelling, same, other):
    expected = printed(capsys, option, spelling)
    assert expected == printed(capsys, option, same)
    assert expected != printed(capsys, option, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory-budget", "1MiB"], "expected at least"),
        (["--memory-budget", "much"], "argument --memory-budget: memory_budget: expected a number of bytes"),
        (["--dtype", "int8"], "argument --dtype: dtype: expected a floating-point torch.dtype, or one of bf16"),
        (["--ignored", "75"], "expected a share from 0 to 1, got 75"),
        (["--model-shape", "4096"], "expected classes x features"),
    ],
    ids=["too-small", "no-size", "no-dtype", "no-share", "no-shape"],
)
def test_mistakes_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        printed(capsys, *arguments)
    assert message in capsys.readouterr().err


def test_where_the_gradients_are_larger_the_logits_gradient_is_what_is_left():
    assert cost.plain_linear_bytes(8, 1000, 4096, torch.bfloat16) == 2 * 8 * 1000
    assert cost.plain_linear_bytes(8192, 1000, 8, torch.float32) == 12 * 8192 * 1000 - 4 * 9192 * 8
    assert cost.plain_linear_bytes(8192, 1000, 8, torch.bfloat16, upcast=False) == 6 * 8192 * 1000 - 2 * 9192 * 8


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "N", "D"),
    [("bfloat16", 512, 32), ("float32", 2048, 128)],  # GEMM libraries add little of their own at so few features
)
def test_formulas_hold_in_a_process(dtype, N, D):
    """The plain path is predicted within 3%. One tensor more or less, of three, would be a third."""
    from bench.speed.memory import of_loss
    from bench.speed.providers import LINEAR, LOGITS
    from bench.speed.workload import Case

    of = getattr(torch, dtype)
    logits, linear = (Case("cost", kind, N, 32768, d, 0.0, dtype, "both") for kind, d in (("logits", 0), ("linear", D)))
    predicted = cost.plain_logits_bytes(N, 32768, of)
    assert 0.99 * predicted <= of_loss(LOGITS[0].name, logits) <= 1.03 * predicted
    predicted = cost.plain_linear_bytes(N, 32768, D, of)
    assert 0.99 * predicted <= of_loss(LINEAR[0].name, linear) <= 1.03 * predicted
    plan = cost.linear_cost(N, 32768, D, dtype=of, device="cpu").plan
    rows, classes = plan.tile(N, 32768)
    # The plan tells the most that it may hold. It always holds a tile of logits, but not always temporaries.
    assert rows * classes * of.itemsize <= of_loss(LINEAR[-1].name, linear) <= plan.bytes
