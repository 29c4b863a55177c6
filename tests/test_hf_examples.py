"""Every example runs as a user would run it, and its loss falls."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "bare_loop": ["tokenizers"],
    "trainer": ["tokenizers", "accelerate"],
    "sft": ["tokenizers", "trl"],
    "dpo": ["tokenizers", "trl"],
    "tensor_parallel": ["tokenizers"],
}
#: How the examples that need several processes are started.
LAUNCHERS = {"tensor_parallel": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


def test_all_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "data"}  # which the others import


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path):
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    script = EXAMPLES / f"{name}.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCHERS.get(name, []), str(script), "--steps", "10"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"(?<!train_)loss\W+(\d+\.\d+)", done.stdout)]
    assert len(losses) >= 3, done.stdout
    assert losses[-1] < losses[0] - 0.3, losses
    assert re.search(r"^fused: [^:]+: [1-9]\d* calls, [1-9]\d* tokens, [1-9]\d* of them ignored$", done.stdout, re.M)
    assert "\nlogits read: never\nlogits not allocated: " in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())
    assert len(script.read_text().splitlines()) <= 75
