"""What all commands that measure share: --out, result files, and their header with the machine and the versions."""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes

from .speed.providers import PROVIDERS, version
from .speed.workload import DEVICE, limits

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of a command that writes a result file. The first line of its module's docstring describes it."""
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").splitlines()[0])
    found.add_argument("--out", type=Path, default=RESULTS, help="the folder that gets the result file")
    return found


def write(folder: Path, stem: str, result: dict[str, Any]) -> Path:
    """Writes a result file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def header(arguments: Sequence[str], module: str = "bench.run", **more: Any) -> dict[str, Any]:
    """The device, versions, commit, date and command of a run, and whatever `more` adds."""
    packages = {provider.package for providers in PROVIDERS.values() for provider in providers if provider.package}
    versions = {name: version(name) for name in ("triton", "transformers", *sorted(packages))}
    return {
        "device": device_name(),
        "kind": DEVICE.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__} | {name: found for name, found in versions.items() if found},
        # Where the repository's history is not at hand, BENCH_COMMIT names the commit.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT"),
        # Results of an earlier run do not change what is measured. A launch table that was tuned just before does,
        # and the next entry is its digest.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results", ":!kernels/tables.json")),
        "launch tables": hashlib.sha256((ROOT / "kernels" / "tables.json").read_bytes()).hexdigest()[:16],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "tokens": str(limits(DEVICE)),
    } | more


def python(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter with this checkout importable."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), text=True, **keywords)


@contextmanager
def importable() -> Iterator[None]:
    """Makes this checkout importable in processes that are started within the context."""
    sys.path.insert(0, str(ROOT))  # new processes inherit it
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))


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
