"""Measures everything that is claimed on this machine, with one command.

    python -m bench.run [--minutes 9] [--quick] [--out DIR]

It runs the gate, then measures losses side by side, memory, a model's training step, bytes that the kernels move and
kernels compiled without a GPU, and fits how cost grows. It writes DIR/<device>-<date>.json, which `bench.figures`
draws. The most important figures come first. When the time is up, nothing more is started, and the file lists what was
left out. To run it without an install, set PYTHONPATH=. before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from . import machine
from .speed import memory
from .speed.providers import PROVIDERS, Provider
from .speed.scaling import fits
from .speed.workload import DEVICE, Case, cases

QUICK_MINUTES = 2.0

#: A suite may finish the case that it is in, but is ended so many seconds after its deadline.
GRACE = 120.0

#: Two cores need about that long to compile every kernel. With less time left, only models' shapes are compiled.
FULL_PROOFS_SECONDS = 1800.0

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a loss is wrong or a measurement failed."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, help="start nothing after so many minutes (9)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:.0f} minutes, fewer kernels")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results", help="where the files go")
    options = parser.parse_args(arguments)
    minutes = options.minutes if options.minutes is not None else QUICK_MINUTES if options.quick else 9.0
    result = run(minutes, options.quick, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{machine.slug(result['header']['device'])}-{result['header']['date']}"
    if options.quick:
        name += "-quick"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result), f"\n{options.out / name}.json", sep="\n")
    return 1 if result["failed"] or any(gate["status"] == "red" for gate in result["gates"]) else 0


def run(minutes: float, quick: bool, arguments: Sequence[str]) -> Result:
    """Each step starts measurements until its share of the time is over; time that it leaves is the next step's."""
    result: Result = {"header": machine.header(arguments, minutes=minutes, quick=quick)}
    result |= {"gates": [], "rows": [], "memory": [], "training step": [], "traffic": [], "proofs": None}
    result |= {"left out": [], "failed": []}
    start = time.time()
    steps: tuple[tuple[float, Callable[[Result, float], None]], ...] = (
        (0.65, _speed), (0.82, _memory), (0.88, _training_step), (0.94, _traffic), (1.0, _proofs),
    )  # fmt: skip
    for share, step in steps:
        try:
            step(result, start + 60 * minutes * share)
        except KeyboardInterrupt:
            result["failed"].append(f"{step.__name__.strip('_')}: interrupted")
            break
    result["fits"] = fits(result["rows"])
    result["header"]["seconds"] = round(time.time() - start)
    return result


def _python(*arguments: str, **keywords: Any) -> subprocess.Popen:
    """Starts this interpreter with this checkout importable."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=machine.ROOT, env=machine.environment(), text=True, **keywords
    )


def _speed(result: Result, deadline: float) -> None:
    """Has pytest run the suite in its own process: a loss that crashes it takes only what comes after."""
    command = ["-m", "pytest", "bench/speed", "--benchmark-only", "-p", "no:cacheprovider", "--deadline", str(deadline)]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        records = Path(folder, "records")
        records.touch()
        process = _python(*command, "--records", str(records), stdout=log, stderr=subprocess.STDOUT)
        try:
            with tqdm(total=len(cases(DEVICE)), desc="speed", unit="case") as bar:
                while process.poll() is None and time.time() < deadline + GRACE:
                    time.sleep(0.2)
                    done = records.read_text().count('"table": "case"')
                    if done > bar.n:
                        bar.update(done - bar.n)
            if process.poll() is None:
                result["failed"].append(f"speed: ended {GRACE:.0f} s after its time")
        finally:  # also keeps what was measured before an interrupt
            process.kill()  # does nothing to a process that has ended
            _collect(result, records.read_text())
        if process.wait() not in (0, 1) or not records.read_text():
            log.seek(0)
            result["failed"].append(f"speed: exit status {process.returncode}: {log.read()[-500:]}")


def _collect(result: Result, records: str) -> None:
    """Sorts the suite's records, one a line, into the result's tables."""
    tables = {"gate": "gates", "row": "rows"}
    for line in records.splitlines():
        record = json.loads(line)
        table = record.pop("table")
        if table == "failed":
            result["failed"].append("speed: {provider}, {case}: {reason}".format(**record))
        elif table == "left out":
            result["left out"].append(f"speed: {record['case']}")
        elif table in tables:
            result[tables[table]].append(record)


def _memory_cases() -> Iterator[tuple[Case, Provider]]:
    """Every loss at the base shape, then at other numbers of tokens, then at the models' shapes."""
    whole = [c for c in cases(DEVICE) if c.direction == "both" and c.ignored in (0.0, 0.75) and c.shape not in "VD"]
    for case in sorted(whole, key=lambda case: {"base": 0, "N": 1}.get(case.shape, 2)):
        for provider in PROVIDERS[case.kind]:
            if not (case.shape == "N" and provider.compiled):
                yield case, provider


def _memory(result: Result, deadline: float) -> None:
    judged = {(gate["kind"], gate["provider"], gate["dtype"]): gate["status"] for gate in result["gates"]}
    for case, provider in tqdm(list(_memory_cases()), desc="memory", unit="process"):
        status = judged.get((case.kind, provider.name, case.dtype), "not judged")
        if status in ("green", "not judged"):  # for the others, the gate has the reason
            fields = case._asdict() | {"provider": provider.name}
            until = deadline if status == "green" else 0.0
            _peak(result, until, "memory", f"{provider.name}, {case}", fields, memory.of_loss, provider.name, case)


def _training_step(result: Result, deadline: float) -> None:
    pairs = [(way, share) for share in memory.SHARES for way in memory.WAYS]
    for way, share in tqdm(pairs, desc="training step", unit="process"):
        fields = memory.SIZES | {"way": way, "ignored": share}
        label = f"{way}, {share:.0%} ignored"
        _peak(result, deadline, "training step", label, fields, memory.of_training_step, way, share)


def _peak(
    result: Result, deadline: float, table: str, label: str, fields: Result, of: Callable[..., int], *arguments: Any
) -> None:
    """Adds a figure of peak memory to a table, or says that it was left out or failed."""
    if time.time() >= deadline:
        result["left out"].append(f"{table}: {label}")
        return
    try:
        result[table].append(fields | {"bytes": of(*arguments)})
    except subprocess.CalledProcessError as e:
        reason = _last_line(e.stderr)
        if "OutOfMemoryError" in reason:
            result["left out"].append(f"{table}: {label}: the device has too little memory")
        else:
            result["failed"].append(f"{table}: {label}: {reason}")


def _traffic(result: Result, deadline: float) -> None:
    quick = ["--quick"] if result["header"]["quick"] else []
    result["traffic"] = _proof(result, deadline, "proofs.traffic", "--json", *quick) or []


def _proofs(result: Result, deadline: float) -> None:
    quick = ["--quick"] if deadline - time.time() < FULL_PROOFS_SECONDS else []
    result["proofs"] = _proof(result, deadline, "proofs", "--summary", *quick)


def _proof(result: Result, deadline: float, module: str, flag: str, *more: str) -> Any:
    """What `bench.proofs` or a module of it writes to the file that follows its flag."""
    name = module.rpartition(".")[2]
    if time.time() >= deadline:
        result["left out"].append(" ".join([f"{name}: python -m bench.{module}", *more]))
        return None
    with tempfile.TemporaryDirectory() as folder, tqdm(total=1, desc=name, unit="report") as bar:
        path = Path(folder, "report.json")
        command = ["-m", f"bench.{module}", flag, str(path), *more]
        process = _python(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate()
        bar.update()
        if process.returncode:
            faults = [line for line in output.splitlines() if line.startswith("FAULT")]
            result["failed"].append(f"{name}: {'; '.join(faults) or _last_line(errors)}")
        return json.loads(path.read_text()) if path.exists() else None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def summary(result: Result) -> str:
    """The text for the terminal: forward and backward at the base shape, losses that are wrong, failures and counts."""
    rows = [row for row in result["rows"] if row["shape"] == "base" and row["direction"] == "both" and "ratio" in row]
    lines = [
        (row["kind"], row["dtype"], f"{row['ignored']:.0%}", row["provider"], row["ms"]["p50"], row["ratio"])
        for row in rows
    ]
    head = ("", "dtype", "ignored", "loss", "ms", "ratio to the first")
    red = [f"RED {g['provider']}, {g['dtype']}: {g['reason']}" for g in result["gates"] if g["status"] == "red"]
    counts = f"{len(result['rows'])} figures, {len(result['left out'])} left out, {len(result['failed'])} failed"
    table = tabulate(lines, head, floatfmt=".2f")
    return "\n".join([table, *red, *result["failed"], counts])


if __name__ == "__main__":
    sys.exit(main())
