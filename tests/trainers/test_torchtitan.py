"""docs/guides/trainers/torchtitan.md, with torchtitan's own loss and model: `make test-trainers` installs it."""

import pytest
import torch

from ..helpers.ranks import Ranks
from ..helpers.snippets import DOCS, blocks, names_of
from ..helpers.torchtitan_worker import step

pytest.importorskip("torchtitan", reason="make test-trainers installs torchtitan")

PAGE = "guides/trainers/torchtitan.md"
CODE = "\n".join(block.code for block in blocks(DOCS / PAGE))


def test_the_loss_of_the_page():
    *expected, _ = step(num_chunks=4)
    *found, (fused, reads) = step(CODE)
    torch.testing.assert_close(found, expected)
    assert fused == 1
    assert not reads


def test_a_model_that_fsdp2_shards(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory)
    try:
        plain = ranks.run("torchtitan_worker.step", [{"sharded": True}] * 2)
        fused = ranks.run("torchtitan_worker.step", [{"sharded": True, "code": CODE}] * 2)
    finally:
        ranks.stop()
    for (*expected, _), (*found, (calls, reads)) in zip(plain, fused, strict=True):
        torch.testing.assert_close(found, expected)
        assert calls == 1
        assert not reads


def test_the_configuration_of_the_page_builds_its_loss():
    """The function of the page is what torchtitan calls for `--config`."""
    page = names_of(PAGE)
    config = page["llama3_8b"]()
    loss = config.loss.build()
    assert type(loss) is page["FusedLoss"]
    assert loss.num_chunks == 1
    assert config.loss.loss_fn.global_vocab_size == config.model_spec.model.vocab_size
