"""The instrument of the host's time counts what a call launches, on tensors that it passes off as a GPU's."""

import json
import os
import subprocess
import sys

import pytest

from ..helpers.paths import ROOT

pytest.importorskip("triton")


def test_launches_of_a_loss(tmp_path):
    """No operation of PyTorch launches anything beside the kernels, and nothing waits for the device."""
    file = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.proofs.host", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {(row["library"], row["direction"]): row for row in json.loads(file.read_text())}
    for library, kernels in (("fused_ignore_ce", 2), ("fused_ignore_ce, one pass", 3)):
        forward, backward = found[library, "forward"], found[library, "backward"]
        assert (forward["kernels"], forward["operations"], forward["waits"]) == (kernels, 0, 0)
        assert (backward["kernels"], backward["operations"], backward["waits"]) == (1, 0, 0)
        assert forward["microseconds"] > 0
        assert f"{library:26} forward" in done.stdout
