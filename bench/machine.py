"""What all commands share: their options, result files with the machine and the versions, and fresh processes."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing import get_all_start_methods, set_forkserver_preload
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes

from .packages import PACKAGES, versions
from .speed.workload import DEVICE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def parser(module: str, doc: str | None, **files: str) -> argparse.ArgumentParser:
    """The parser of a command, which the first line of its module's docstring describes.

    `files` are options that name a file, with what is written to it. A command without any has --out, a folder for its
    result file.
    """
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").splitlines()[0])
    for name, what in files.items():
        found.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what} to this file")
    if not files:
        found.add_argument("--out", type=Path, default=RESULTS, help="the folder that gets the result file")
    return found


def write(path: Path, result: Any) -> Path:
    """Writes a result file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def compile_kernels(module: str) -> None:
    """Starts a command anew if TRITON_INTERPRET is set, under which Triton would compile nothing."""
    if "TRITON_INTERPRET" in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment())


def header(arguments: Sequence[str], module: str = "bench.run", **more: Any) -> dict[str, Any]:
    """The device, versions, commit, date and command of a run, and whatever `more` adds."""
    return {
        "device": device_name(),
        "kind": DEVICE.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions(*PACKAGES.values(), "flash-attn", "triton", "transformers") | {"torch": torch.__version__},
        # Where the repository's history is not at hand, BENCH_COMMIT names the commit.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT"),
        # Results of an earlier run do not change what is measured. A launch table that was tuned just before does,
        # and the next entry is its digest.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results", ":!kernels/tables.json")),
        "launch tables": hashlib.sha256((ROOT / "kernels" / "tables.json").read_bytes()).hexdigest()[:16],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", module, *arguments]),
    } | more


def python(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter with this checkout importable."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), text=True, **keywords)


def one_line(error: BaseException) -> str:
    """An error as a reason in a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].rstrip(": ")


def last_line(text: str) -> str:
    """The last line of an error's text, which says what it is."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def importable() -> AbstractContextManager[Any]:
    """Makes this checkout importable in processes that are started within the context."""
    return mock.patch.object(sys, "path", [str(ROOT), *sys.path])  # new processes inherit it


def in_processes(function: Callable[..., Any], *arguments: Any, processes: int = 1) -> list[Any]:
    """Calls a function in fresh processes that can import this checkout, and returns their results.

    The function's first argument is the number of the process. Where the system can fork, the processes are forks of
    one that has imported PyTorch and done nothing else.
    """
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    set_forkserver_preload(["torch"])
    returned = get_context(method).SimpleQueue()
    with importable():
        start_processes(_call, (returned, function, arguments), processes, start_method=method)
    return [returned.get() for _ in range(processes)]


def _call(number: int, returned: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    returned.put(function(number, *arguments))


def environment() -> dict[str, str]:
    """The environment of a new process: this checkout is importable, Triton compiles, and pytest-benchmark measures."""
    unwanted = ("TRITON_INTERPRET", "PYTEST_XDIST")
    found = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


def device_name() -> str:
    """The device's name, as the CUDA driver or the operating system gives it."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(text: str) -> str:
    """A text made fit for a file's name.

    >>> slug("Intel(R) Xeon(R) Processor")
    'intel-xeon-processor'
    """
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def _git(*arguments: str) -> str | None:
    """The output of a git command in this checkout; None if it fails, as it does outside of a repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
