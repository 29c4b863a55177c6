"""Checks, tunes and times everything on the CUDA device at hand, in one command of at most 25 minutes.

    python -m bench.gpu [--only PART ...] [--out DIR]

Parts, in this order: correctness (the kernels' tests on the device), sanitizer (some of them under compute-sanitizer,
where it is found), tune (launch tables), run (`bench.run` with the tuned tables) and host (the host's time of a call).
If correctness fails, no other part is started. Every part has a time limit, after which it is killed; its output up to
then is kept. DIR gets the parts' result files and gpu-<device>-<date>.json, which says how each part went. To run it
without an install, set PYTHONPATH=. before it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import machine

MINUTES = 25.0

#: How much of the end of a part's output is kept.
KEPT_CHARACTERS = 20_000

#: Tests of the kernels themselves.
KERNELS = tuple(f"tests/kernels/test_{name}.py" for name in ("cross_entropy", "one_pass", "on_chip"))

#: Tests that run the compiled kernels where there is a CUDA device. The tests of the kernels themselves come first.
TESTS = (
    *KERNELS, "tests/kernels/test_launch.py", "tests/losses/test_cross_entropy.py", "tests/logits/test_gradients.py",
    "tests/logits/test_ignore.py", "tests/logits/test_layouts.py", "tests/core/test_options.py",
    "tests/core/test_statistics.py", "tests/logits/test_hazards.py", "tests/losses/test_linear_cross_entropy.py",
    "tests/losses/test_modules.py", "tests/losses/test_log_probs.py", "tests/linear/test_gradients.py",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command, its time limit and what it needs. In the command, {out} is DIR and {data} a file for its result."""

    name: str
    minutes: float
    command: tuple[str, ...]
    modules: tuple[str, ...] = ()
    program: str | None = None  # a program that is started in place of Python, and runs it
    is_gate: bool = False  # nothing is started after it has failed
    environment: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str | None:
        """What the part needs and this machine lacks; None if nothing is missing."""
        absent = [name for name in self.modules if find_spec(name) is None]
        if absent:
            return f"Python finds no module {', '.join(absent)}"
        if self.program is not None and find_program(self.program) is None:
            return f"{self.program} is neither on PATH nor in /usr/local/cuda/bin"
        return None

    def arguments(self, out: Path, data: Path) -> list[str]:
        own = [word.format(out=out, data=data) for word in self.command]
        program = [] if self.program is None else [str(find_program(self.program)), "--error-exitcode", "1"]
        return [*program, sys.executable, *own]


PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-q")
PARALLEL = ("-n", "8") if find_spec("xdist") else ()
BENCH = ("pytest", "pytest_benchmark", "tabulate", "tqdm", "numpy", "pandas")

PARTS = (
    Part("correctness", 6.0, (*PYTEST, *PARALLEL, *TESTS), ("pytest",), is_gate=True),
    Part(
        "sanitizer", 3.0, (*PYTEST, "--quick", *KERNELS), ("pytest",),
        program="compute-sanitizer",
        # Without PyTorch's cache, an access past the end of a tensor does not land in another tensor's memory.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    ),
    Part("tune", 6.0, ("-m", "bench.tune", "--minutes", "5", "--out", "{out}"), ("tqdm",)),
    Part("run", 9.0, ("-m", "bench.run", "--minutes", "7", "--out", "{out}"), BENCH),
    Part("host", 1.0, ("-m", "bench.proofs.host", "--json", "{data}")),
)  # fmt: skip


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Returns 1 if a part failed or ran out of time."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = machine.parser("bench.gpu", __doc__)
    names = [part.name for part in parts]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts, in their usual order")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench.gpu: PyTorch finds no CUDA device here (torch.cuda.is_available() is False). Nothing was started. "
            "Without a GPU, python -m bench.run measures the CPU, and python -m bench.proofs examines the kernels."
        )
    about = machine.header(arguments, "bench.gpu")
    result, path = run([part for part in parts if part.name in options.only], options.out.resolve(), about)
    print(f"{summary(result)}\n{path}")
    return 1 if any(part["status"] in ("failed", "out of time") for part in result["parts"]) else 0


def run(parts: Sequence[Part], out: Path, about: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Runs one part after the other. The file is written after each, so that an interrupt loses nothing."""
    result: dict[str, Any] = {"header": about, "parts": []}
    path = machine.write(out / f"gpu-{machine.slug(about['device'])}-{about['date']}.json", result)
    deadline = time.time() + 60 * MINUTES
    failed_gate = None
    for part in parts:
        print(f"{part.name}: at most {part.minutes:g} minutes", flush=True)
        reason = f"{failed_gate} failed" if failed_gate else part.missing()
        if reason is None and time.time() >= deadline:
            reason = f"the {MINUTES:g} minutes were up"
        if reason is not None:
            done: dict[str, Any] = {"status": "left out", "reason": reason}
        else:
            done = one(part, out, min(60 * part.minutes, deadline - time.time()))
        if part.is_gate and done["status"] != "passed":
            failed_gate = failed_gate or part.name
        result["parts"].append({"name": part.name} | done)
        machine.write(path, result)
    return result, path


def one(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a part. Returns how it went, the end of its output, and the data that it wrote."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        data = Path(folder, "data.json")
        command = part.arguments(out, data)
        process = subprocess.Popen(
            command, cwd=machine.ROOT, env=machine.environment() | dict(part.environment),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the group has all processes that it started
                process.wait()
        log.seek(0)
        return {
            "status": status,
            "seconds": round(time.time() - start, 1),
            "command": command,
            "output": log.read()[-KEPT_CHARACTERS:],
            "data": json.loads(data.read_text()) if data.exists() else None,
        }


def summary(result: dict[str, Any]) -> str:
    """A line for every part, and the last lines of a failed part's output."""
    lines = []
    for part in result["parts"]:
        seconds = f", {part['seconds']:.0f} s" if "seconds" in part else f": {part['reason']}"
        lines.append(f"{part['name']}: {part['status']}{seconds}")
        if part["status"] in ("failed", "out of time"):
            lines += [f"    {line}" for line in part["output"].splitlines()[-15:]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
