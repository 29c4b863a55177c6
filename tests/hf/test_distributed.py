"""A patched model in two processes, with averaged gradients or sharded parameters, has a plain model's losses."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ..helpers.hf_worker import DISTRIBUTED, assert_same
from ..helpers.paths import TESTS

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo, by which ranks talk on a CPU"
)

#: The way in which the head's weights are freed before a loss after the forward is taken.
REFUSED = "FSDP2, root resharded"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results by (rank, name, patched), all of one pair of processes, which take longer to start than to train."""
    folder = tmp_path_factory.mktemp("distributed")
    worker = TESTS / "helpers" / "hf_worker.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
            env=environment,
            stderr=(folder / f"{rank}.err").open("w"),
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.wait(timeout=100)
    except subprocess.TimeoutExpired:
        pass  # the tests say which results are missing
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = {"stderr": "".join((folder / f"{rank}.err").read_text()[-2000:] for rank in range(2))}
    for rank in range(2):
        for line in (folder / str(rank)).read_text().splitlines() if (folder / str(rank)).exists() else ():
            name, patched, done = json.loads(line)
            found[rank, name, patched] = done
    return found


def result(results, *key):
    assert key in results, f"did not come back: {results['stderr']}"
    return results[key]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_same_losses(name, rank, results):
    expected, ours = result(results, rank, name, False), result(results, rank, name, True)
    assert "error" not in expected, expected["error"]
    assert "error" not in ours, ours["error"]
    assert_same(ours["losses"], expected["losses"], 2e-2 if "bf16" in name else 1e-5)
    assert ours["linear"] == len(ours["losses"])
    assert expected["linear"] == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [name for name in DISTRIBUTED if name != REFUSED])
def test_a_loss_after_the_forward(name, rank, results):
    expected, ours = result(results, rank, name, False), result(results, rank, name, "outside")
    assert "error" not in ours, ours["error"]
    assert_same(ours["losses"], expected["losses"], 2e-2 if "bf16" in name else 1e-5)
    assert ours["linear"] == len(ours["losses"])


def test_a_head_that_is_freed_after_the_forward_is_an_error(results):
    error = result(results, 0, REFUSED, "outside")["error"]
    assert "needs fully_shard(model, reshard_after_forward=False)" in error


def test_the_ranks_had_different_batches(results):
    assert result(results, 0, "DDP", True)["losses"] != result(results, 1, "DDP", True)["losses"]
