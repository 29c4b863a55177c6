"""Memory is a promise like any other: measured in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

OURS, PLAIN = "fused_cross_entropy(x, y)", "F.cross_entropy(x.float(), y)"
N, V = 2048, 32768


def peak_mib(name: str, share: float) -> float:
    """Beside the logits and the gradient, forward and backward, bf16."""
    command = [sys.executable, "-m", "bench.memory", name, str(N), str(V), str(share)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True)
    return int(done.stdout) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is read from /proc")
@pytest.mark.parametrize("share", [0.0, 0.75])
def test_beside_the_gradient_there_is_one_block(share):
    assert peak_mib(OURS, share) <= 64


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is read from /proc")
def test_the_measure_sees_what_pytorch_holds():
    assert peak_mib(PLAIN, 0.0) > 2 * N * V * 4 / 2**20  # the float32 copy and its log-softmax, at least
