"""Everything that is claimed, measured on this machine by one command.

    python -m bench.run [--minutes 9] [--quick] [--out DIR]

Gates, losses side by side, memory, a model's training step, bytes that the kernels move, kernels compiled ahead of
time; then fits and plots. It writes DIR/<device>-<date>.json, .md and plots. What matters most comes first, and when
the time is up nothing more is started; what was left out is in the files. Without an install: PYTHONPATH=. before it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import machine, memory, plots, report, training_step
from .providers import PROVIDERS, Provider
from .scaling import fits, plan_ahead
from .workload import DEVICE, Case, cases

QUICK_MINUTES = 2.0

#: Seconds that a suite may take past its deadline, for the case that it is in, before it is ended.
GRACE = 120.0

#: Compiling every kernel takes two cores a quarter of an hour; with less than that left, it is the quick look.
FULL_AOT_SECONDS = 900.0

Result = dict[str, Any]


class Deadline:
    """A moment, and whether it is over."""

    def __init__(self, seconds: float) -> None:
        self.at = time.time() + seconds

    @property
    def left(self) -> float:
        return self.at - time.time()

    @property
    def over(self) -> bool:
        return self.left <= 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a loss is wrong, or something failed that should not."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, help="start nothing after so many (9)")
    parser.add_argument("--quick", action="store_true", help=f"a look: {QUICK_MINUTES:.0f} minutes, fewer reports")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results", help="where the files go")
    options = parser.parse_args(arguments)
    minutes = options.minutes if options.minutes is not None else QUICK_MINUTES if options.quick else 9.0
    result = run(minutes, options.quick, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{machine.slug(result['header']['device'])}-{result['header']['date']}" + "-quick" * options.quick
    result["plots"] = [path.name for path in plots.draw(result, options.out, name)]
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(report.markdown(result))
    print(report.summary(result), f"\n{options.out / name}.md", sep="\n")
    return 1 if result["failed"] or any(gate["status"] == "red" for gate in result["gates"]) else 0


def run(minutes: float, quick: bool, arguments: Sequence[str]) -> Result:
    """Each step may start measurements until its share of the time is over; what it does not take is the next one's."""
    result: Result = {"header": machine.header(arguments, minutes=minutes, quick=quick)}
    result |= {"gates": [], "rows": [], "memory": [], "training step": [], "traffic": [], "aot": None}
    result |= {"left out": [], "failed": []}
    start = time.time()
    steps: tuple[tuple[float, Callable[[Result, Deadline, bool], None]], ...] = (
        (0.65, _speed), (0.82, _memory), (0.88, _training_step), (0.94, _traffic), (1.0, _aot),
    )  # fmt: skip
    for share, step in steps:
        try:
            step(result, Deadline(start + 60 * minutes * share - time.time()), quick)
        except KeyboardInterrupt:
            result["failed"].append(f"{step.__name__.strip('_')}: interrupted")
            break
    result["fits"] = fits(result["rows"])
    result["plan ahead"] = plan_ahead(result["rows"], DEVICE.type)
    result["header"]["seconds"] = round(time.time() - start)
    return result


def _python(*arguments: str, **keywords: Any) -> subprocess.Popen:
    """Of this interpreter, with this checkout importable.

    Triton compiles and pytest-benchmark measures, whatever the caller's environment says.
    """
    unwanted = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment["PYTHONPATH"] = os.pathsep.join([str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen([sys.executable, *arguments], cwd=machine.ROOT, env=environment, text=True, **keywords)


def _speed(result: Result, deadline: Deadline, quick: bool) -> None:
    """The suites, run by pytest in a process of its own: a loss that crashes it takes only what comes after."""
    command = ["-m", "pytest", "bench/test_losses.py", "--benchmark-only", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        records = Path(folder, "records")
        records.touch()
        process = _python(
            *command, "--deadline", str(deadline.at), "--records", str(records), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            with tqdm(total=len(cases(DEVICE)), desc="speed", unit="case") as bar:
                while process.poll() is None and deadline.left > -GRACE:
                    time.sleep(0.2)
                    done = records.read_text().count('"table": "case"')
                    if done > bar.n:
                        bar.update(done - bar.n)
            if process.poll() is None:
                result["failed"].append(f"speed: ended {GRACE:.0f} s after its time")
        finally:  # what was measured before an interrupt, too
            process.kill()  # which does nothing to one that has ended
            _collect(result, records.read_text())
        if process.wait() not in (0, 1) or not records.read_text():
            log.seek(0)
            result["failed"].append(f"speed: exit status {process.returncode}: {log.read()[-500:]}")


def _collect(result: Result, records: str) -> None:
    """What the suite appended, a line each."""
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
    """Of all losses: at the base shape, in a sweep of tokens, then at the models' shapes."""
    whole = [c for c in cases(DEVICE) if c.direction == "both" and c.ignored in (0.0, 0.75) and c.shape not in "VD"]
    for case in sorted(whole, key=lambda case: {"base": 0, "N": 1}.get(case.shape, 2)):
        for provider in PROVIDERS[case.kind]:
            if not (case.shape == "N" and provider.compiled):
                yield case, provider


def _memory(result: Result, deadline: Deadline, quick: bool) -> None:
    judged = {(gate["kind"], gate["provider"], gate["dtype"]): gate["status"] for gate in result["gates"]}
    for case, provider in tqdm(list(_memory_cases()), desc="memory", unit="process"):
        name = provider.name
        of = f"memory: {name}, {case}"
        status = judged.get((case.kind, name, case.dtype), "")
        if status not in ("green", ""):
            continue  # the gate has the reason
        if deadline.over or not status:
            result["left out"].append(of)
            continue
        try:
            result["memory"].append(case._asdict() | {"provider": name, "bytes": memory.peak(name, case)})
        except subprocess.CalledProcessError as e:
            result["failed"].append(f"{of}: {_last_line(e.stderr)}")


def _training_step(result: Result, deadline: Deadline, quick: bool) -> None:
    pairs = [(way, share) for share in training_step.SHARES for way in training_step.WAYS]
    for way, share in tqdm(pairs, desc="training step", unit="process"):
        of = f"training step: {way}, {share:.0%} ignored"
        if deadline.over:
            result["left out"].append(of)
            continue
        try:
            peak = training_step.peak(way, share)
        except subprocess.CalledProcessError as e:
            result["failed"].append(f"{of}: {_last_line(e.stderr)}")
            continue
        result["training step"].append(training_step.SIZES | {"way": way, "ignored": share, "bytes": peak})


def _traffic(result: Result, deadline: Deadline, quick: bool) -> None:
    found = _report(result, deadline, "traffic", "--json", *["--quick"] * quick)
    result["traffic"] = found or []


def _aot(result: Result, deadline: Deadline, quick: bool) -> None:
    result["aot"] = _report(result, deadline, "aot", "--summary", *["--quick"] * (deadline.left < FULL_AOT_SECONDS))


def _report(result: Result, deadline: Deadline, name: str, flag: str, *more: str) -> Any:
    """What an instrument writes to a file."""
    if deadline.over:
        result["left out"].append(f"{name}: python -m bench.{name} {' '.join(more)}".strip())
        return None
    with tempfile.TemporaryDirectory() as folder, tqdm(total=1, desc=name, unit="report") as bar:
        path = Path(folder, "report.json")
        process = _python("-m", f"bench.{name}", flag, str(path), *more, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate()
        bar.update()
        if process.returncode:
            faults = [line for line in output.splitlines() if line.startswith("FAULT")]
            result["failed"].append(f"{name}: {'; '.join(faults) or _last_line(errors)}")
        return json.loads(path.read_text()) if path.exists() else None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


if __name__ == "__main__":
    sys.exit(main())
