"""Pictures of a run of `bench.run`: time and peak memory against ignored tokens and sizes, and of a training step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from .memory import WAYS
from .providers import PROVIDERS
from .scaling import sweep

Row = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]

TITLES = {"logits": "Loss of logits", "linear": "Loss from hidden states"}

#: Ours is drawn thick in the first colour, its peers in the others; all of them differ for colour-blind readers too.
OURS = "#d55e00"
PEERS = ("#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f", "#5b4b8a", "#a0522d")
MARKERS = "svD^P<>X"

ROOF = "copy of memory, the roof"

PERCENT = "ignored tokens, %"
PEAK = "peak MiB without operands\nand their gradients"
RATE = "GB/s of the fewest bytes"


class Panel(NamedTuple):
    """What one part of a picture shows: lines against an axis."""

    title: str
    xlabel: str
    ylabel: str
    lines: Lines
    logarithmic: bool = False


def pictures(result: Row) -> dict[str, Any]:
    """What each picture of a run shows, by its name: rows of panels, or the figures of training steps.

    What the run did not measure is left out.
    """
    found = {
        "ignored": _time_and_memory(result, "kept", "percent", PERCENT),
        "tokens": _time_and_memory(result, "N", "N", "tokens", logarithmic=True),
        "bandwidth": _bandwidth(result),
    }
    kept = {name: [[panel for panel in row if panel.lines] for row in rows] for name, rows in found.items()}
    shown: dict[str, Any] = {name: [row for row in rows if row] for name, rows in kept.items()}
    return {name: data for name, data in (shown | {"training-step": result["training step"]}).items() if data}


def draw(name: str, data: Any, about: str, folder: Path) -> None:
    """Saves what `pictures` has by a name."""
    figure = _training_step(data, about) if name == "training-step" else _figure(data, about)
    save(figure, folder / f"{name}.png", data)


def save(figure: Figure, path: Path, data: Any) -> None:
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Data": digest(data), "Software": None})


def digest(data: Any) -> str:
    """A digest of what a picture shows. The picture carries it, and a test compares it with the newest results."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _time_and_memory(result: Row, varied: str, x: str, xlabel: str, logarithmic: bool = False) -> list[list[Panel]]:
    """A column for each kind of loss, times above peak memory. Titles have the sizes that are not varied."""
    upper, lower = [], []
    for kind, title in TITLES.items():
        times, peaks = (sweep(result[table], kind, varied) for table in ("rows", "memory"))
        first = (times or peaks or [{}])[0]
        sizes = ", ".join(f"{name}={first[name]}" for name in "NVD" if name != varied and first.get(name))
        milliseconds = _lines(times, kind, x, lambda row: row["ms"]["p50"])
        mebibytes = _lines(peaks, kind, x, lambda row: row["bytes"] / 2**20)
        upper.append(Panel(f"{title}: {sizes}", xlabel, "milliseconds", milliseconds, logarithmic))
        lower.append(Panel("", xlabel, PEAK, mebibytes, logarithmic))
    return [upper, lower]


def _bandwidth(result: Row) -> list[list[Panel]]:
    rows = sweep(result["rows"], "logits", "V")
    lines = _lines(rows, "logits", "V", lambda row: row["rate"])
    if lines:
        lines[ROOF] = list({row["V"]: row["roof"] for row in rows if "roof" in row}.items())
    return [[Panel(TITLES["logits"], "vocabulary", RATE, lines)]]


def _lines(rows: list[Row], kind: str, x: str, y: Callable[[Row], float]) -> Lines:
    """The points of every loss that has at least two."""
    lines = {p.name: [(r[x], y(r)) for r in rows if r["provider"] == p.name] for p in PROVIDERS[kind]}
    return {name: points for name, points in lines.items() if len(points) > 1}


def _figure(rows: list[list[Panel]], about: str) -> Figure:
    columns = max(map(len, rows))
    figure = Figure(figsize=(max(5.2 * columns, 6.5), 3.1 * len(rows) + 1.3), layout="constrained")
    better = "Higher" if rows[0][0].ylabel == RATE else "Lower"
    figure.suptitle(f"Forward and backward, bfloat16. {better} is better.\n{about}", fontsize=10)
    every = figure.subplots(len(rows), columns, squeeze=False)
    for number, row in enumerate(rows):
        for axes in every[number, len(row) :]:
            axes.remove()
        for axes, panel in zip(every[number], row, strict=False):
            _panel(axes, panel)
            if number == len(rows) - 1:  # the panels of a column have the same lines
                axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _panel(axes: Any, panel: Panel) -> None:
    peers = 0
    for label, points in panel.lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        if label == ROOF:
            style: dict[str, Any] = {"color": "black", "linestyle": ":"}
        elif "fused_" in label:
            style = {"color": OURS, "marker": "o", "linewidth": 2.5, "zorder": 3}
        else:
            style = {"color": PEERS[peers % len(PEERS)], "marker": MARKERS[peers % len(MARKERS)]}
            peers += 1
        axes.plot(xs, ys, label=label, **style)
    axes.set_title(panel.title, fontsize=11)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0, top=1.08 * max(y for points in panel.lines.values() for _, y in points))
    if panel.xlabel == PERCENT:
        axes.set_xlim(-3, 100)
    axes.grid(alpha=0.3)


def _training_step(rows: Sequence[Row], about: str) -> Figure:
    first = rows[0]
    figure = Figure(figsize=(6.5, 3.9), layout="constrained")
    figure.suptitle(
        f"Peak memory of a training step above model and gradients, float32\nLlama of {first['layers']} layers, "
        f"{first['T']} tokens, V={first['V']}, D={first['D']}\n{about}", fontsize=10,
    )  # fmt: skip
    axes = figure.subplots()
    shares = sorted({row["ignored"] for row in rows})
    for number, (way, label, colour) in enumerate(
        zip(WAYS, ("transformers", "patch_model(model)"), (PEERS[0], OURS), strict=True)
    ):
        own = {row["ignored"]: row["bytes"] / 2**20 for row in rows if row["way"] == way}
        places = [shares.index(share) + (number - 0.5) * 0.36 for share in own]
        bars = axes.bar(places, list(own.values()), 0.34, label=label, color=colour)
        axes.bar_label(bars, fmt="{:.0f} MiB", padding=2, fontsize=9)
    logits = 4 * first["T"] * first["V"] / 2**20
    axes.axhline(logits, color="black", linestyle=":", label=f"the logits alone, {logits:.0f} MiB")
    axes.set_xticks(range(len(shares)), [f"{share:.0%} of the tokens ignored" for share in shares])
    axes.set_ylabel("MiB")
    axes.set_ylim(top=1.12 * max(row["bytes"] for row in rows) / 2**20)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    return figure
