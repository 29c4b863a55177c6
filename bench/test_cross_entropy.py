"""Logits loss, forward and backward, side by side: `python -m pytest bench --benchmark-only`."""

import pytest
import torch

from bench.compare import gate, in_turns
from bench.providers import LOGITS_LOSSES
from bench.workload import logits_and_target

N, V = 2048, 32768
SHARES = (0.0, 0.5, 0.75, 0.95)
BASELINE = next(iter(LOGITS_LOSSES))


@pytest.mark.parametrize("share", SHARES, ids=lambda share: f"{share:.0%} ignored")
@pytest.mark.parametrize("name", LOGITS_LOSSES)
def test_forward_and_backward(benchmark, name, share):
    loss = LOGITS_LOSSES[name]
    gate(loss, LOGITS_LOSSES[BASELINE], *logits_and_target(64, 1000, 0.5))
    x, target = logits_and_target(N, V, share)
    benchmark.group = f"N={N} V={V} bf16, {share:.0%} ignored, {x.device}, {torch.get_num_threads()} threads"
    in_turns(benchmark, loss, LOGITS_LOSSES[BASELINE], (x, target), rounds=9)
