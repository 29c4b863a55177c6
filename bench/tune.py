"""Tunes the launch tables on the CUDA device at hand, and writes them with the measurements that are their reason.

    python -m bench.tune [--minutes 8] [--table FILE] [--out DIR]

It varies the number of warps, logits per thread, tiles per program and programs per multiprocessor, for forward,
backward and the one pass that the device runs; where that keeps rows on the chip, the size of their pieces. Shapes have
vocabularies of 1k to 256k and 256 to 32k rows of bfloat16 logits. The device's entry goes into kernels/tables.json,
which the launchers read when they are imported; every time that was measured goes into DIR.

When the time is up, shapes that were measured are used, and all others keep the program that `kernels/launch.py`
computes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_ignore_ce.kernels import cross_entropy, tables
from fused_ignore_ce.kernels.chip import Chip, chip_of

from . import machine
from .tuning import search
from .tuning.search import Clock, Measured, Point
from .tuning.trial import Trials, cuda_timer

TABLE = machine.ROOT / "kernels" / "tables.json"

#: Errors of launches that a device has no room for.
EXPECTED = ("OutOfResources", "OutOfMemoryError")

#: The share of the device's free memory that logits and gradient may take.
MEMORY_SHARE = 0.7


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = machine.parser("bench.tune", __doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after so many minutes (8)")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file that gets the device's entry")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench.tune measures on a CUDA device, and PyTorch finds none here (torch.cuda.is_available() is False). "
            "Run it on a machine with a GPU; launch tables cannot be tuned without one."
        )
    if cross_entropy.interpreted():
        raise SystemExit("bench.tune: TRITON_INTERPRET is set, so kernels would be interpreted. Unset it.")
    device = torch.device("cuda", torch.cuda.current_device())
    chip = chip_of(device)
    todo = search.points(int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]), chip)
    about = machine.header(arguments, "bench.tune", minutes=options.minutes)
    found = tuned(todo, chip, Trials(device, cuda_timer), 60 * options.minutes, about, time.time)
    write(options.table, torch.cuda.get_device_name(device), found["table"])
    path = machine.write(options.out / f"tune-{machine.slug(about['device'])}-{about['date']}.json", found)
    print(f"{summary(found)}\n{options.table}\n{path}")
    return 1 if found["failed"] else 0


def tuned(
    todo: list[Point], chip: Chip, clock: Clock, seconds: float, about: dict[str, Any], now: Callable[[], float]
) -> dict[str, Any]:
    """The launch table, all times, and the points that there was no time for."""
    deadline = now() + seconds
    with tqdm(todo, desc="tune", unit="point") as bar:
        measured, left_out = search.search(bar, chip, clock, lambda: now() < deadline)
    versions = ", ".join(f"{name} {about['versions'].get(name)}" for name in ("torch", "triton"))
    reason = f"measured by {about['command']} on {about['date']}: {versions}, commit {about['commit']}"
    times = [each.point._asdict() | {"launches": _launches(each)} for each in measured]
    failed = [
        f"{each.point}: {launch['num_warps']} warps, {launch['CHUNKS']} x {launch['WIDTH']} logits: {launch['failed']}"
        for each, point in zip(measured, times, strict=True)
        for launch in point["launches"]
        if launch["failed"] and not launch["failed"].startswith(EXPECTED)
    ]
    return {
        "header": about,
        "table": search.entry(measured, chip, reason),
        "times": times,
        "left out": [str(point) for point in left_out],
        "failed": failed,
    }


def _launches(measured: Measured) -> list[dict[str, Any]]:
    return [
        asdict(launch) | {"microseconds": None, "failed": own}
        if isinstance(own, str)
        else asdict(launch) | {"microseconds": round(1e6 * own, 2), "failed": None}
        for launch, own in measured.seconds.items()
    ]


def write(path: Path, device: str, entry: dict[str, Any]) -> None:
    """Replaces a device's entry, and reads the file back as the launchers do. If that fails, the file is restored."""
    before = path.read_text() if path.exists() else "{}"
    path.write_text(json.dumps(json.loads(before) | {device: entry}, indent=1) + "\n")
    try:
        tables.read(path)
    except ValueError:
        path.write_text(before)
        raise


def summary(found: dict[str, Any]) -> str:
    """What the table gains at every point that decided about it."""
    lines = []
    for operation in tables.WARPS:
        for step in found["table"][operation]:
            program = f"{step['num_warps']} warps, {step['thread_logits']} logits, {step['tiles']} tiles"
            lines += [
                f"{operation:9} N={each['N']:<6} V={each['V']:<7} {each['microseconds']:>10} us, arithmetic "
                f"{each['arithmetic']}, best {each['best']}  ({program}, {step['programs']} programs)"
                for each in step["measured"]
            ]
    counts = f"{len(found['times'])} points, {len(found['left out'])} left out, {len(found['failed'])} launches failed"
    return "\n".join([*lines, *found["failed"], counts])


if __name__ == "__main__":
    sys.exit(main())
