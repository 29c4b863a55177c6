"""Draws bandwidth against vocabulary, time and memory against tokens, and time against the share of ignored tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .providers import PROVIDERS
from .scaling import sweep

Row = dict[str, Any]

TITLES = {"logits": "loss of logits", "linear": "linear loss"}

ROOF = {"color": "black", "linestyle": ":"}


def draw(result: Row, folder: Path, name: str) -> list[Path]:
    """Saves the plots for which a run has figures; returns their paths."""
    from matplotlib.figure import Figure

    device = result["header"]["device"]
    paths = []
    for what, panels in (("bandwidth", _bandwidth), ("tokens", _tokens), ("ignored", _ignored)):
        drawn = [panel for panel in panels(result) if panel[1]]
        if not drawn:
            continue
        figure = Figure(figsize=(5.5 * len(drawn), 4.2), layout="constrained")
        figure.suptitle(f"{device}, bfloat16, forward and backward", fontsize=10)
        every = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (labels, lines, logarithmic) in zip(every, drawn, strict=True):
            for number, (label, points) in enumerate(lines.items()):
                xs, ys = zip(*sorted(points), strict=True)
                axes.plot(xs, ys, label=label, **(ROOF if label == "roof" else {"color": f"C{number}", "marker": "o"}))
            axes.set(**labels)
            if logarithmic:
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        paths.append(folder / f"{name}-{what}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def _lines(rows: list[Row], kind: str, x: str, y: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
    """The points of every loss that has at least two."""
    lines = {p.name: [(r[x], y(r)) for r in rows if r["provider"] == p.name] for p in PROVIDERS[kind]}
    return {name: points for name, points in lines.items() if len(points) > 1}


def _bandwidth(result: Row) -> list[tuple]:
    rows = sweep(result["rows"], "logits", "V")
    lines = _lines(rows, "logits", "V", lambda r: r["rate"])
    roof = {r["V"]: r["roof"] for r in rows if "roof" in r}
    lines |= {"roof": list(roof.items())} if lines else {}
    return [({"title": "loss of logits", "xlabel": "vocabulary", "ylabel": "GB/s of the fewest bytes"}, lines, False)]


def _tokens(result: Row) -> list[tuple]:
    panels = []
    for kind, title in TITLES.items():
        lines = _lines(sweep(result["rows"], kind, "N"), kind, "N", lambda r: r["ms"]["p50"])
        panels.append(({"title": title, "xlabel": "tokens", "ylabel": "ms"}, lines, True))
    lines = _lines(sweep(result["memory"], "linear", "N"), "linear", "N", lambda r: r["bytes"] / 2**20)
    labels = {"title": "linear loss", "xlabel": "tokens", "ylabel": "MiB beside operands and gradients"}
    return [*panels, (labels, lines, True)]


def _ignored(result: Row) -> list[tuple]:
    panels = []
    for kind, title in TITLES.items():
        rows = [r | {"percent": 100 * r["ignored"]} for r in sweep(result["rows"], kind, "kept")]
        lines = _lines(rows, kind, "percent", lambda r: r["ms"]["p50"])
        panels.append(({"title": title, "xlabel": "ignored, %", "ylabel": "ms"}, lines, False))
    return panels
