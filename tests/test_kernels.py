"""The kernels under every kind of launch: the result must not depend on tiles or splits."""

from itertools import product

import pytest
import torch

from fused_ignore_ce import reference
from fused_ignore_ce.kernels import cross_entropy
from fused_ignore_ce.kernels.launch import INTERPRETED, Chip, Launch, forward_launch

OPTIONS = {"ignore_index": -100, "label_smoothing": 0.1, "softcap": 10.0, "logit_scale": 1.5, "z_loss": 0.01}
V = 1000

LAUNCHES = [
    pytest.param(Launch(1, 128, 4, splits=1, split_v=1024), id="one-row-many-blocks"),
    pytest.param(Launch(4, 64, 4, splits=1, split_v=1024), id="four-rows-many-blocks"),
    pytest.param(Launch(2, 1024, 4, splits=1, split_v=1024), id="one-block"),
    pytest.param(Launch(1, 128, 4, splits=4, split_v=256), id="four-splits"),
    pytest.param(Launch(2, 128, 4, splits=8, split_v=128), id="a-split-a-block"),
]


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_launch_does_not_matter(launch, probs, device):
    x = torch.randn(2, 3, V, device=device, dtype=torch.float64) * 4
    x[0, 0, :300] = -torch.inf
    x[1, 1] = float("nan")
    q = torch.rand_like(x) if probs else None
    target = torch.tensor([400, 0, V - 1, 128, -100, 127], device=device)
    weight = torch.rand(V, device=device, dtype=torch.float64)
    options = {**OPTIONS, "softcap": None}
    loss, lse, _, correct, entropy = cross_entropy.forward(
        x, target, weight, q, **options, with_stats=True, launch=launch
    )
    expected = reference.rows(x, target.view(2, 3), weight, q, **options)
    torch.testing.assert_close(loss, expected.loss.flatten())
    torch.testing.assert_close(lse.sum(0), expected.lse.flatten())
    torch.testing.assert_close(entropy, expected.entropy.flatten())
    assert torch.equal(correct, expected.correct.flatten())


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("best", [0, 130, V - 1])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_argmax_across_blocks_and_splits(launch, best, device):
    x = torch.zeros(1, 2, V, device=device)
    x[..., best:] = 1.0  # ties from there on: the first counts
    target = torch.tensor([best, min(best + 1, V - 1)], device=device)
    *_, correct, _ = cross_entropy.forward(x, target, None, None, **OPTIONS, with_stats=True, launch=launch)
    assert correct.tolist() == [True, best == V - 1]


def test_few_rows_are_split_and_many_are_not():
    assert forward_launch(1, 4, 128256, 2, True, INTERPRETED).splits > 8
    assert forward_launch(1, 8192, 128256, 2, True, INTERPRETED).splits == 1
    assert forward_launch(1, 4, 300, 2, True, INTERPRETED).splits == 1
    assert forward_launch(1, 4, 128256, 2, True, Chip(90, 1)).splits == 1


@pytest.mark.parametrize("V", [0, 1, 2, 31, 1024, 1025, 32000, 50257, 128256, 262144, 2**31 - 1])
@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (3, 5), (1, 8192), (2**20, 1)])
def test_splits_cover_the_vocabulary_once(rows, V):
    for contiguous, itemsize in product((True, False), (2, 4, 8)):
        launch = forward_launch(*rows, V, itemsize, contiguous, INTERPRETED)
        assert launch.split_v % launch.BLOCK_V == 0
        assert launch.splits * launch.split_v >= V > (launch.splits - 1) * launch.split_v or V == 0
        assert launch.BLOCK_N & (launch.BLOCK_N - 1) == 0


def test_memory_is_poisoned(device):
    """What the other tests rely on: memory that nobody wrote reads as NaN."""
    assert torch.empty(5, device=device).isnan().all()
    assert torch.ones(2, device=device).new_empty(5).isnan().all()
    assert torch.empty_like(torch.ones(5, device=device)).isnan().all()
