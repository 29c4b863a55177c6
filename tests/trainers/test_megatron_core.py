"""docs/guides/trainers/megatron-core.md, with Megatron's own GPT: `make test-trainers` installs it."""

import pytest
import torch

from ..helpers.ranks import Ranks
from ..helpers.snippets import DOCS, blocks

pytest.importorskip("megatron.core", reason="make test-trainers installs Megatron-core")

CODE = "\n".join(block.code for block in blocks(DOCS / "guides/trainers/megatron-core.md"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    ranks = Ranks(1, tmp_path_factory)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory)
    yield ranks
    ranks.stop()


def check(ranks, **options):
    """Losses, gradients and logits of every rank are those of `GPTModel`."""
    plain = ranks.run("megatron_worker.step", [options] * ranks.world)
    fused = ranks.run("megatron_worker.step", [{"code": CODE, **options}] * ranks.world)
    torch.testing.assert_close(fused, plain)
    losses, gradients, _ = fused[0]
    assert (losses == 0).any()
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"mtp": True}], ids=["untied", "tied", "multi-token"])
def test_one_rank(one, options):
    check(one, **options)


def test_losses_of_bfloat16_are_not_rounded(one):
    ((plain, *_),), ((fused, *_),) = (
        one.run("megatron_worker.step", [{"bf16": True, **code}]) for code in ({}, {"code": CODE})
    )
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-3)
    assert (fused != fused.bfloat16()).any()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_two_ranks(two, sequence_parallel, tied):
    check(two, tensor_parallel=2, sequence_parallel=sequence_parallel, tied=tied)
