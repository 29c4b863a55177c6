"""Logits loss, forward and backward, side by side: `python -m pytest bench --benchmark-only`."""

import pytest
import torch

from bench.providers import BASELINE, LOGITS_LOSSES
from bench.workload import logits_and_target

N, V = 2048, 32768
SHARES = (0.0, 0.5, 0.75, 0.95)


def gradient(loss, x, target):
    (dx,) = torch.autograd.grad(loss(x, target), x)
    if dx.is_cuda:
        torch.cuda.synchronize()
    return dx


def gate(loss):
    """No speed is measured of a loss that is wrong."""
    x, target = logits_and_target(64, 1000, 0.5)
    wide = x.detach().double().requires_grad_()
    true = gradient(LOGITS_LOSSES[BASELINE], wide, target).float()
    error = (gradient(loss, x, target).float() - true).abs().max()
    assert error <= 2**-8 * true.abs().max(), f"wrong gradient: off by {error}"


@pytest.mark.parametrize("share", SHARES, ids=lambda share: f"{share:.0%} ignored")
@pytest.mark.parametrize("name", LOGITS_LOSSES)
def test_forward_and_backward(benchmark, name, share):
    gate(LOGITS_LOSSES[name])
    x, target = logits_and_target(N, V, share)
    benchmark.group = f"N={N} V={V} bf16, {share:.0%} ignored, {x.device}, {torch.get_num_threads()} threads"
    benchmark.extra_info["baseline"] = name == BASELINE
    benchmark.pedantic(gradient, args=(LOGITS_LOSSES[name], x, target), warmup_rounds=2, rounds=9)
