"""Measures everything that is claimed on this machine, with one command.

    python -m bench.run [--minutes 9] [--quick] [--out DIR]

It first checks that losses are right. Then it measures losses side by side, peak memory and a model's training step,
compiles the kernels without a GPU, and fits how cost grows. It writes DIR/<device>-<date>.json, which `bench.figures`
draws. The most important figures come first. When the time is up, nothing more is started, and the file lists what was
left out. To run it without an install, set PYTHONPATH=. before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch.multiprocessing.spawn import ProcessException
from tqdm import tqdm

from . import machine
from .speed import memory
from .speed.gate import NO_ROOM
from .speed.providers import PROVIDERS, Provider
from .speed.scaling import fits, losses
from .speed.workload import DEVICE, Case, cases

QUICK_MINUTES = 2.0

#: The suite may finish its current case after the deadline, but is killed this many seconds later.
GRACE = 120.0

#: Two cores need about this long to compile every kernel. With less time left, only models' shapes are compiled.
FULL_PROOFS_SECONDS = 1800.0

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a loss is wrong or a measurement failed."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = machine.parser("bench.run", __doc__)
    parser.add_argument("--minutes", type=float, help="start nothing after so many minutes (9)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:.0f} minutes, fewer kernels")
    options = parser.parse_args(arguments)
    minutes = options.minutes if options.minutes is not None else QUICK_MINUTES if options.quick else 9.0
    result = run(minutes, options.quick, arguments)
    stem = f"{machine.slug(result['header']['device'])}-{result['header']['date']}{'-quick' * options.quick}"
    path = machine.write(options.out / f"{stem}.json", result)
    print(summary(result), f"\n{path}", sep="\n")
    return 1 if result["failed"] or any(gate["status"] == "red" for gate in result["gates"]) else 0


def run(minutes: float, quick: bool, arguments: Sequence[str]) -> Result:
    """Each step starts measurements until its share of the time is over. The next step gets the time that it leaves."""
    result: Result = {"header": machine.header(arguments, minutes=minutes, quick=quick)}
    result |= {"gates": [], "rows": [], "memory": [], "training step": [], "proofs": None}
    result |= {"left out": [], "failed": []}
    start = time.time()
    for share, step in ((0.65, _speed), (0.85, _memory), (0.94, _training_step), (1.0, _proofs)):
        step(result, start + 60 * minutes * share)
    result["fits"] = fits(result["rows"])
    result["header"]["seconds"] = round(time.time() - start)
    return result


def _speed(result: Result, deadline: float) -> None:
    """Has pytest run the suite in its own process. If a loss crashes it, what was measured before is kept."""
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "records")
        records.touch()
        command = ["-m", "pytest", "bench/speed", "--benchmark-only", "--benchmark-quiet", "-p", "no:cacheprovider"]
        command += ["--deadline", str(deadline), "--records", str(records)]
        try:
            status = machine.python(*command, timeout=deadline + GRACE - time.time()).returncode
        except subprocess.TimeoutExpired:
            result["failed"].append(f"speed: ended {GRACE:.0f} s after its time")
        else:
            if status not in (0, 1) or not records.stat().st_size:
                result["failed"].append(f"speed: exit status {status}")
        for line in records.read_text().splitlines():
            table, entry = json.loads(line)
            result[table].append(entry)


def _memory(result: Result, deadline: float) -> None:
    judged = {(gate["kind"], gate["provider"], gate["dtype"]): gate["status"] for gate in result["gates"]}
    for case, provider in tqdm(memory_cases(), desc="memory", unit="process"):
        status = judged.get((case.kind, provider.name, case.dtype), "not judged")
        if status in ("green", "not judged"):  # the gate's entry has the reason for the others
            fields = case._asdict() | {"provider": provider.name}
            until = deadline if status == "green" else 0.0
            measure = partial(memory.of_loss, provider.name, case)
            _peak(result, until, "memory", f"{provider.name}, {case}", fields, measure)


def memory_cases() -> list[tuple[Case, Provider]]:
    """Every loss at the base shape, then at other numbers of tokens, then at the models' shapes."""
    whole = [c for c in cases(DEVICE) if c.direction == "both" and c.ignored in (0.0, 0.75) and c.shape not in "VD"]
    whole.sort(key=lambda case: {"base": 0, "N": 1}.get(case.shape, 2))
    return [(case, p) for case in whole for p in PROVIDERS[case.kind] if not (case.shape == "N" and p.compiled)]


def _training_step(result: Result, deadline: float) -> None:
    pairs = [(way, share) for share in memory.SHARES for way in memory.WAYS]
    for way, share in tqdm(pairs, desc="training step", unit="process"):
        fields = memory.SIZES | {"way": way, "ignored": share}
        measure = partial(memory.of_training_step, way, share)
        _peak(result, deadline, "training step", f"{way}, {share:.0%} ignored", fields, measure)


def _peak(result: Result, deadline: float, table: str, label: str, fields: Result, measure: Callable[[], int]) -> None:
    """Adds a figure of peak memory to a table, or says that it was left out or failed."""
    if time.time() >= deadline:
        result["left out"].append(f"{table}: {label}")
        return
    try:
        result[table].append(fields | {"bytes": measure()})
    except ProcessException as e:
        reason = machine.last_line(str(e))
        if "OutOfMemoryError" in reason:
            result["left out"].append(f"{table}: {label}: {NO_ROOM}")
        else:
            result["failed"].append(f"{table}: {label}: {reason}")


def _proofs(result: Result, deadline: float) -> None:
    """Runs `bench.proofs`, and adds what it writes to a file."""
    quick = ["--quick"] if deadline - time.time() < FULL_PROOFS_SECONDS else []
    command = ["-m", "bench.proofs", *quick]
    if time.time() >= deadline:
        result["left out"].append(f"proofs: python {' '.join(command)}")
        return
    print("proofs: python", *command, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        done = machine.python(*command, "--summary", str(path), capture_output=True)
        if done.returncode:
            faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
            result["failed"].append(f"proofs: {'; '.join(faults) or machine.last_line(done.stderr)}")
        result["proofs"] = json.loads(path.read_text()) if path.exists() else None


def summary(result: Result) -> str:
    """The text for the terminal: forward and backward at the base shape, losses that are wrong, failures and counts."""
    rows = losses(result["rows"]).query("shape == 'base' and direction == 'both'").dropna(subset="ratio")
    lines = rows[["kind", "dtype", "ignored", "provider", "ms.p50", "ratio"]]
    head, forms = ("", "dtype", "ignored", "loss", "ms", "ratio to the first"), ("", "", ".0%", "", ".2f", ".2f")
    red = [f"RED {g['provider']}, {g['dtype']}: {g['reason']}" for g in result["gates"] if g["status"] == "red"]
    counts = f"{len(result['rows'])} figures, {len(result['left out'])} left out, {len(result['failed'])} failed"
    return "\n".join([tabulate(lines, head, showindex=False, floatfmt=forms), *red, *result["failed"], counts])


if __name__ == "__main__":
    sys.exit(main())
