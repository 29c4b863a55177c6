"""The bench's promises: wrong losses are not timed, missing ones have a reason, and what was left out is listed.

pytest runs the suite in a process of its own, as `bench.run` has it, with a plugin that puts small cases and odd losses
in place of the real ones.
"""

import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

pytest.importorskip("pandas")
pytest.importorskip("pytest_benchmark")
pytest.importorskip("tqdm")

from bench import machine, run
from bench.speed import gate
from bench.speed.gate import judge
from bench.speed.providers import LINEAR, LOGITS, Provider
from bench.speed.workload import DEVICE, cases

SMALL = """
import torch
import torch.nn.functional as F
from bench.speed import gate, providers, workload
from bench.speed.providers import Provider
from bench.speed.workload import Case

gate.SLOWEST = float("inf")  # on a busy machine the probe may find any loss slow

workload.cases = lambda device: [
    Case("base", "logits", 64, 1000, 0, 0.5, "float32", "both"),
    Case("base", "logits", 65, 1000, 0, 0.5, "float32", "forward"),
]


def fails(x, y):
    if len(x) == 65:
        raise MemoryError("of this size")
    return F.cross_entropy(x, y)


def no_room(x, y):
    if len(x) == 65:
        raise torch.OutOfMemoryError("of the device")
    return F.cross_entropy(x, y)


providers.PROVIDERS["logits"] = (
    providers.LOGITS[0],
    Provider("wrong", "logits", lambda: lambda x, y: F.cross_entropy(x, y) + 0.01 * x.square().mean()),
    Provider("raises", "logits", lambda: lambda x, y: x.no_such_method()),
    Provider("absent", "logits", lambda: None, package="no-such-package"),
    Provider("fails", "logits", lambda: fails),
    Provider("no room", "logits", lambda: no_room),
    providers.LOGITS[-1],
)
"""
BASELINE, OURS = LOGITS[0].name, LOGITS[-1].name

#: Compiling a loss takes half a minute. `bench.run` judges those, too, before it times them.
NOT_COMPILED = [provider for provider in (*LOGITS, *LINEAR) if not provider.compiled]


def empty():
    result = {"header": machine.header(["--minutes", "1"], seconds=1), "proofs": None}
    return result | {name: [] for name in ("gates", "rows", "memory", "training step", "left out", "failed")}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The suite's results for the small cases, and those of pytest-benchmark itself."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "small_bench.py").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_ADDOPTS", f"-p small_bench --benchmark-json {folder / 'own.json'}")
        patch.setenv("PYTHONPATH", str(folder))
        found = empty()
        run._speed(found, time.time() + 100)
    return found | {"pytest-benchmark": json.loads((folder / "own.json").read_text())}


def gates(result):
    return {gate["provider"]: gate for gate in result["gates"]}


def test_what_is_wrong_gets_no_speed(result):
    assert gates(result)["wrong"]["status"] == gates(result)["raises"]["status"] == "red"
    assert gates(result)["wrong"]["reason"].startswith("loss is off by")
    assert "AttributeError" in gates(result)["raises"]["reason"]
    assert {row["provider"] for row in result["rows"]} == {BASELINE, OURS, "fails", "no room"}
    assert "RED wrong, float32: loss is off by" in run.summary(result)


def test_what_is_missing_is_skipped_with_its_reason(result):
    assert gates(result)["absent"]["status"] == "skipped"
    assert gates(result)["absent"]["reason"] == "no-such-package is not installed"


def test_what_fails_at_one_size_is_said_and_measured_at_others(result):
    assert [row["N"] for row in result["rows"] if row["provider"] == "fails"] == [64]
    (failed,) = result["failed"]
    assert "fails" in failed
    assert "N65-V1000" in failed
    assert "MemoryError: of this size" in failed
    assert failed in run.summary(result)


def test_what_has_too_little_memory_is_left_out_and_no_failure(result):
    assert [row["N"] for row in result["rows"] if row["provider"] == "no room"] == [64]
    [left_out] = result["left out"]
    assert left_out.endswith("N65-V1000-float32-50% ignored-forward: no room: the device has too little memory")


def test_peak_memory_of_what_has_too_little_is_left_out():
    def peak(error):
        raise ProcessRaisedException(f"Traceback\n{error}: of the device\n", 0, 1)

    found = empty()
    for error in ("torch.OutOfMemoryError", "ValueError"):
        run._peak(found, time.time() + 9, "memory", "a loss", {}, partial(peak, error))
    assert found["left out"] == ["memory: a loss: the device has too little memory"]
    assert found["failed"] == ["memory: a loss: ValueError: of the device"]


def test_the_figures_are_those_that_pytest_benchmark_measured(result):
    """The rounds of a case alternate between its losses and the roof, and each loss gets the median of its own."""
    (own,) = (b for b in result["pytest-benchmark"]["benchmarks"] if "N64" in b["name"])
    names = [BASELINE, "fails", "no room", OURS, "roof"]
    assert own["options"]["timer"] == "perf_counter"
    assert own["group"].startswith("base-logits-N64-V1000-float32-50% ignored-both, ")
    assert list(own["extra_info"]["seconds"]) == names
    for number, name in enumerate(names[:-1]):
        (row,) = (row for row in result["rows"] if (row["provider"], row["N"]) == (name, 64))
        seconds = own["stats"]["data"][number :: len(names)]
        assert row["rounds"] == len(seconds)
        assert row["ms"]["p50"] == pytest.approx(1e3 * statistics.median(seconds))


def test_rows_say_what_they_are(result):
    (row,) = (row for row in result["rows"] if row["provider"] == OURS and row["direction"] == "both")
    assert (row["kind"], row["N"], row["V"], row["D"], row["ignored"], row["dtype"]) == (
        "logits",
        64,
        1000,
        0,
        0.5,
        "float32",
    )
    assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
    assert row["roof"] > 0
    assert row["ratio"] > 0
    (first,) = (row for row in result["rows"] if row["provider"] == BASELINE and row["direction"] == "both")
    assert first["ratio"] == 1


def test_out_of_time_everything_is_listed(tmp_path, capsys):
    """End to end, with no time at all: nothing is started, nothing is forgotten, the files are there."""
    assert run.main(["--minutes", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert path.stem == f"{machine.slug(found['header']['device'])}-{found['header']['date']}"
    assert [found[name] for name in ("gates", "rows", "memory", "failed")] == [[]] * 4
    left_out = found["left out"]
    assert {f"speed: {case}" for case in cases(DEVICE)} <= set(left_out)
    assert any(line.startswith("proofs: python -m bench.proofs") for line in left_out)
    assert any(line.startswith(f"memory: {OURS}, base-logits") for line in left_out)
    assert sum(line.startswith("training step:") for line in left_out) == 4
    assert {"device", "threads", "versions", "commit", "dirty", "date", "command"} <= found["header"].keys()
    assert found["header"]["command"].startswith("python -m bench.run --minutes 0 --out")
    assert f"0 figures, {len(left_out)} left out, 0 failed" in capsys.readouterr().out


def test_a_crash_is_a_failure(monkeypatch):
    monkeypatch.setattr(machine, "python", lambda *_, **k: subprocess.run([sys.executable, "-c", "exit(3)"], **k))
    found = empty()
    run._speed(found, time.time() + 10)
    assert found["failed"][0].startswith("speed: exit status 3")


@pytest.mark.parametrize("provider", NOT_COMPILED, ids=lambda provider: f"{provider.kind}-{provider.name}")
def test_every_loss_is_right_here_or_says_why_not(provider):
    verdict = judge(provider, torch.device("cpu"), "float32")
    assert verdict.status in ("green", "slow", "skipped")
    if verdict.status == "skipped":
        assert verdict.reason
    else:
        assert provider.name in {p.name for p in (*LOGITS, *LINEAR) if p.package in (None, "trl")}


def test_the_gate_sees_a_wrong_gradient_of_a_right_loss():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return torch.nn.functional.cross_entropy(x, y)

        @staticmethod
        def backward(ctx, upstream):
            """Ignores the upstream gradient, as if it were 1."""
            x, y = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(torch.nn.functional.cross_entropy(x, y), x)[0], None

    verdict = judge(Provider("wrong", "logits", lambda: Wrong.apply), torch.device("cpu"), "float32")
    assert verdict.status == "red"
    assert verdict.reason.startswith("gradient of logits is off by")


def test_a_loss_that_takes_too_long_is_slow_and_the_baseline_never_is(monkeypatch):
    """Seconds are made up: 9 for the loss, 1 for the baseline."""
    seconds = iter([9.0, 10.0, 11.0, 1.0, 2.0, 3.0])

    class Timer:
        def __init__(self, *_, **__):
            pass

        def timeit(self, number):
            return SimpleNamespace(median=next(seconds))

    monkeypatch.setattr(gate, "Timer", Timer)
    slow = judge(LOGITS[-1], torch.device("cpu"), "float32")
    assert (slow.status, slow.probe, slow.reason) == ("slow", 9.0, "9 times the plain path's time at 256x8192")
    assert judge(LOGITS[0], torch.device("cpu"), "float32").status == "green"  # though no seconds are left


def test_results_are_no_change_of_the_tree():
    """What a run writes must not make the next one's header say that the tree was changed."""
    assert ":!bench/results" in (Path(machine.__file__)).read_text()
