"""Kernels compiled without a GPU: what the null driver records, and what is found in the machine code."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from bench.proofs import picture

ROOT = Path(__file__).parents[2]


def python(*arguments, **environment):
    """Runs Python at the root without Triton's interpreter, which this process may be using."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def worker(name, tmp_path, file="proofs_worker.py"):
    run = python(ROOT / "tests" / "helpers" / file, name, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return worker("small", tmp_path_factory.mktemp("cache"))


def test_launches_are_recorded(small):
    launched = [(kernel["name"], tuple(kernel["grid"]), kernel["num_warps"]) for kernel in small["kernels"]]
    assert launched == [
        ("sums_per_thread", (7, 2, 1), 8),
        ("sum_per_program", (7, 1, 1), 8),
        ("scaled", (1, 1, 1), 4),
        ("scaled", (1, 1, 1), 4),
        ("scaled", (3, 1, 1), 4),
    ]
    assert small["kernels"][0]["constants"] == {"LANES": 256, "WIDTH": 8}
    assert small["kernels"][0]["parameters"] == ["x_ptr", "out_ptr", "V"]
    # The same kernel with another grid is not compiled again, and a dry run compiles none.
    assert small["requests"] == 4
    assert small["dry"] == [1, 0]


def test_sums_per_thread_have_no_barrier_in_the_loop(small):
    [loop, *_] = small["kernels"][0]["loops"]
    logits = loop["loaded"] / 2
    assert (loop["barriers"], loop["shuffles"], loop["special"]) == (0, 0, logits)


def test_a_sum_per_program_has_barriers_in_the_loop(small):
    [loop, *_] = small["kernels"][1]["loops"]
    assert loop["barriers"] > 0
    assert loop["shuffles"] > 0


def test_spills_are_seen(small):
    spilling, fitting = small["kernels"][2:4]
    assert spilling["spills"] > 0
    assert spilling["registers"] <= 32
    assert fitting["spills"] == 0


def test_the_interpreter_is_refused():
    run = python("-c", "from bench.proofs.null_driver import NullDriver; NullDriver('cuda', 90).__enter__()",
                 TRITON_INTERPRET="1")  # fmt: skip
    assert "TRITON_INTERPRET is set" in run.stderr.splitlines()[-1]


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger is not installed")
def test_a_peer_is_launched_by_its_own_launcher(tmp_path):
    found = worker("liger", tmp_path)
    assert found["error"] == ""
    assert found["loops"] == 2  # one pass walks a row twice
    assert found["tile"] == [1, 2048]


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="Liger is not installed")
def test_published_counts_are_those_of_the_library(tmp_path):
    """The installed release may be a later one, and another release of Triton may have compiled it."""
    installed, kept = worker("counted", tmp_path)
    for now, then in zip(installed, kept, strict=True):
        assert now == pytest.approx(then, rel=0.25)


def test_every_kernel_that_a_launcher_asks_for_is_compiled(tmp_path):
    found = worker("tiles", tmp_path)
    assert found["drawn"] == 200
    assert found["unknown"] == []


def test_kernels_of_a_measured_table_are_compiled_for_its_architecture(tmp_path):
    found = worker("tuned", tmp_path)
    assert found["tables"] == {"90": ["", "A device"], "80": [""]}
    assert found["warps"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the CUDA driver, which this machine needs")
def test_kernels_get_what_was_passed_to_their_launch(tmp_path):
    found = worker("launched", tmp_path)
    assert set(found["checked"]) == set(found["kernels"])
    assert found["profiled"] == found["checked"]  # a profiler's hook sees every launch
    assert found["wrong arguments"].startswith("forward_kernel: expected the parameters")
    assert "expected the kernel that Triton chooses" in found["wrong kernels"]


def test_quick_run_is_green(tmp_path):
    files = {flag: tmp_path / f"{flag}.json" for flag in ("json", "summary")}
    run = python("-m", "bench.proofs", "--quick", "--json", files["json"], "--summary", files["summary"])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    proofs = json.loads(files["json"].read_text())
    assert {kernel["target"] for kernel in proofs["kernels"]} == {"sm_90", "gfx942"}
    assert all(kernel["registers" if kernel["target"] == "sm_90" else "vgpr_count"] > 0 for kernel in proofs["kernels"])
    assert all(0 < row["share of the memory roof"] <= 1 for row in proofs["predictions, not measurements"])
    summary = json.loads(files["summary"].read_text())
    assert {"commit", "dirty", "date", "versions"} <= summary["header"].keys()
    picture.draw(picture.rows(summary), "here", tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
