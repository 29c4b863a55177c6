"""The chain of `bench.gpu`, with parts that need no GPU: what stops it, what it reports, and what it keeps."""

import json
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("tabulate")

from bench import gpu
from bench.gpu import PARTS, Part

from ..helpers.paths import ROOT


def part(name, code, **more):
    return Part(name, more.pop("minutes", 1.0), ("-c", code, "{out}", "{data}"), **more)


FINE = part("fine", "import sys, pathlib; print('said'); pathlib.Path(sys.argv[2]).write_text('[1, 2]')")
FAILING = part("failing", "print('reason'); raise SystemExit(3)", is_gate=True)


@pytest.fixture
def chain(monkeypatch, tmp_path):
    """A function that runs parts as if there were a device, and returns the exit status and each part's entry."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run(*parts, only=()):
        arguments = ["--out", str(tmp_path / "out"), *(["--only", *only] if only else [])]
        status = gpu.main(arguments, parts)
        [path] = (tmp_path / "out").glob("gpu-*.json")
        return status, {each["name"]: each for each in json.loads(path.read_text())["parts"]}

    return run


def test_parts_run_in_order_and_what_they_wrote_is_kept(chain, capsys):
    status, found = chain(FINE, replace(FINE, name="second"))
    assert status == 0
    assert list(found) == ["fine", "second"]
    assert (found["fine"]["status"], found["fine"]["output"], found["fine"]["data"]) == ("passed", "said\n", [1, 2])
    assert "second: passed" in capsys.readouterr().out


def test_nothing_starts_after_a_gate_has_failed(chain, capsys):
    status, found = chain(FAILING, FINE)
    assert status == 1
    assert (found["failing"]["status"], found["failing"]["output"]) == ("failed", "reason\n")
    assert found["fine"] == {"name": "fine", "status": "left out", "reason": "failing failed"}
    printed = capsys.readouterr().out
    assert "fine: left out: failing failed" in printed
    assert "    reason" in printed
    status, found = chain(replace(FAILING, is_gate=False), FINE)
    assert status == 1
    assert found["fine"]["status"] == "passed"


def test_a_part_ends_with_all_that_it_started_when_its_time_is_over(chain, tmp_path):
    """The part starts a process that appends to a file as long as it lives."""
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(beats)!r}, 'a').write('.'); time.sleep(0.1)"
    code = (
        f"import pathlib, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not pathlib.Path({str(beats)!r}).exists(): time.sleep(0.1)\n"
        "print('started', flush=True); time.sleep(600)"
    )
    status, found = chain(part("slow", code, minutes=5 / 60), FINE)
    assert status == 1
    assert (found["slow"]["status"], found["slow"]["output"]) == ("out of time", "started\n")
    assert found["slow"]["seconds"] < 60
    assert found["fine"]["status"] == "passed"
    written = beats.stat().st_size
    time.sleep(0.5)
    assert 0 < written == beats.stat().st_size


def test_what_is_missing_is_left_out_with_its_reason(chain):
    status, found = chain(
        replace(FINE, modules=("no_such_module",)),
        replace(FINE, name="tool", program="no-such-program"),
        replace(FINE, name="last"),
    )
    assert status == 0
    assert found["fine"]["reason"] == "Python finds no module no_such_module"
    assert found["tool"]["reason"].startswith("no-such-program is neither on PATH")
    assert found["last"]["status"] == "passed"


def test_all_time_together_is_limited(chain, monkeypatch):
    monkeypatch.setattr(gpu, "MINUTES", 0.0)
    status, found = chain(FINE)
    assert (status, found["fine"]["reason"]) == (0, "the 0 minutes were up")


def test_parts_can_be_chosen(chain):
    assert list(chain(FAILING, FINE, only=["fine"])[1]) == ["fine"]


def test_a_program_runs_python(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "find_program", lambda name: f"/bin/{name}")
    found = replace(FINE, program="compute-sanitizer").arguments(tmp_path, tmp_path / "data")
    assert found[:3] == ["/bin/compute-sanitizer", "--error-exitcode", "1"]
    assert found[-2:] == [str(tmp_path), str(tmp_path / "data")]


def test_the_parts_fit_their_time_and_name_what_exists():
    assert sum(part.minutes for part in PARTS) <= gpu.MINUTES
    assert [part.name for part in PARTS] == ["correctness", "sanitizer", "tune", "run", "host"]
    assert PARTS[0].is_gate
    for each in PARTS:
        files = [word for word in each.command if word.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
        modules = [word for word in each.command if word.startswith("bench.")]
        assert all(find_spec(module) for module in modules)
        assert bool(files) != bool(modules)
        if "--minutes" in each.command:
            assert float(each.command[each.command.index("--minutes") + 1]) < each.minutes


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device, and this one has one")
def test_without_a_device_nothing_is_started(tmp_path):
    with pytest.raises(SystemExit, match="PyTorch finds no CUDA device here") as caught:
        gpu.main(["--out", str(tmp_path / "out")])
    assert "python -m bench.proofs" in str(caught.value)
    assert not (tmp_path / "out").exists()
