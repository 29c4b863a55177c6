"""Patched models that DeepSpeed shards: losses and parameters are those of the unpatched model.

DeepSpeed is installed nowhere else: `make test-deepspeed` runs these.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="make test-deepspeed installs DeepSpeed")

from ..helpers.live_memory import CASES as LOSSES
from ..helpers.live_memory import assert_gathered_no_longer
from ..helpers.ranks import Ranks

#: What changes the losses. All other options are compared with the unpatched model of ZeRO-3 without them.
NUMBERS = {"tied", "frozen", "bf16", "accumulate", "between", "lora"}

CASES = {
    "untied": {},
    "tied": {"tied": True},
    "after the forward": {"outside": True},
    "after the forward, of logits that are read": {"outside": "read"},
    "tied, after the forward": {"tied": True, "outside": True},
    "frozen head": {"frozen": True},
    "accumulated": {"accumulate": 2},
    "tied, accumulated, after the forward": {"tied": True, "accumulate": 2, "outside": True},
    "bfloat16": {"bf16": True},
    "made partitioned": {"made_partitioned": True},
    "tied, made partitioned": {"tied": True, "made_partitioned": True},
    "checkpointed": {"checkpointed": True},
    "checkpointed, after the forward": {"checkpointed": True, "outside": True},
    "evaluation and generation between steps": {"between": True},
    "LoRA on the head": {"lora": True},
    "LoRA on the head, after the forward": {"lora": True, "outside": True},
    "LoRA on the head, accumulated, bfloat16": {"lora": True, "accumulate": 2, "bf16": True},
    "LoRA on the head, with PyTorch's linear": {"lora": True, "plain_linear": True},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2, tied, accumulated": {"stage": 2, "tied": True, "accumulate": 2},
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    group = Ranks(2, tmp_path_factory)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def run(two_ranks):
    """Calls a function of `deepspeed_worker.py` on both ranks."""

    def run(function, patched, **options):
        calls = [{"rank": rank, "patched": patched, **options} for rank in range(2)]
        return two_ranks.run(f"deepspeed_worker.{function}", calls, timeout=300)

    return run


@pytest.fixture(scope="module")
def plain(run):
    """What the unpatched model gives under ZeRO-3."""
    known = {}

    def plain(**options):
        options = {name: value for name, value in options.items() if name in NUMBERS}
        key = tuple(sorted(options.items()))
        if key not in known:
            known[key] = run("train", False, **options)
        return known[key]

    return plain


def assert_same(ours, expected, tolerance=1e-5, fused=True):
    """The same losses and parameters on every rank, every loss fused if it can be, and a model that learns."""
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine["losses"], theirs["losses"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mine["parameters"], theirs["parameters"], rtol=tolerance, atol=tolerance)
        assert mine["fused"] >= len(mine["losses"]) * fused
    first, second = (found["losses"] for found in expected)
    assert sum(first) + sum(second) < len(first) * (first[0] + second[0])


@pytest.mark.parametrize("case", CASES)
def test_training(run, plain, case):
    options = CASES[case]
    ours, expected = run("train", True, **options), plain(**options)
    lora = options.get("lora")  # DeepSpeed gathers a layer's weights for that layer's call only, so nothing is fused
    reads = options.get("outside") == "read" or (lora and not options.get("plain_linear"))
    assert_same(ours, expected, 1e-2 if options.get("bf16") else 1e-5, fused=not (reads or lora))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine["seen"], theirs["seen"], rtol=1e-4, atol=1e-4)
        assert bool(mine["reads"]) == bool(reads or mine["seen"])  # the evaluation reads logits, too


def test_saving(run, plain, tmp_path):
    """What is saved has the unpatched model's names and values, and loads into it."""
    ours, expected = run("train", True, folder=str(tmp_path)), plain()
    assert_same(ours, expected)
    (saved,) = tmp_path.glob("model.bin*")
    saved = torch.load(saved, weights_only=True)
    torch.testing.assert_close(saved, expected[0]["parameters"], rtol=1e-5, atol=1e-5)


def test_accelerate(run, plain):
    assert_same(run("train_by_accelerate", True), plain())


def test_trainer(run, tmp_path):
    expected = run("train_by_trainer", False, folder=str(tmp_path / "plain"))
    ours = run("train_by_trainer", True, folder=str(tmp_path / "ours"))
    assert_same(ours, expected)
    names = [sorted(path.name for path in Path(tmp_path, who, "saved").iterdir()) for who in ("plain", "ours")]
    assert names[0] == names[1]


@pytest.mark.parametrize(("loss", "frozen", "gradients"), LOSSES)
def test_memory(run, loss, frozen, gradients):
    plain, ours = (run("memory", patched, loss=loss, frozen=frozen) for patched in (False, True))
    assert_gathered_no_longer(ours, plain, gradients)
