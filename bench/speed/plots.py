"""Pictures of a run of `bench.run`: time and peak memory against ignored tokens and sizes, and of a training step.

And one of a run of `bench.budgets`: time against peak memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from .memory import WAYS
from .scaling import losses, sweep

TITLES = {
    "logits": "Loss of logits", "linear": "Loss from hidden states", "distillation": "Distillation from hidden states",
}  # fmt: skip

#: This package's losses are thick lines of the first colour, its peers' have the others. All of them differ for
#: colour-blind readers too. The default loss is the last, and has a solid line.
OURS = "#d55e00"
PEERS = ("#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f", "#5b4b8a", "#a0522d")
MARKERS = "svD^P<>X"
OUR_LINES = ("-", "--", ":")

ROOF = "copy of memory, the roof"

#: The lines of a page's first picture, and how they are named there.
GAIN = {
    "F.cross_entropy(F.linear(h, w).float(), y)": "plain PyTorch", "torch.compile of the first": "torch.compile of it",
    "TRL": "TRL's head", "Liger": "Liger", "fused_linear_cross_entropy(h, w, y)": "this package",
}  # fmt: skip

#: What is measured, as the label of an axis.
TIME = "milliseconds"
PEAK = "peak MiB without operands\nand their gradients"
RATE = "GB/s of the fewest bytes"

#: The label of the horizontal axis, by the picture's name.
AGAINST = {
    "ignored": "ignored tokens, %", "tokens": "tokens", "bandwidth": "vocabulary", "distillation": "vocabulary",
}  # fmt: skip

LEGEND = {"fontsize": 8, "frameon": False, "loc": "upper center"}


def pictures(result: dict[str, Any]) -> dict[str, DataFrame]:
    """The data of each picture of a run, by its name: points of lines, or the figures of training steps.

    Pictures that the run has no figures for are left out.
    """
    every = losses(result["rows"], result["memory"])
    every = every.assign(**{TIME: every["ms.p50"], PEAK: every["bytes"] / 2**20, RATE: every["rate"]})
    logits = sweep(every, "V").query("kind == 'logits'")
    roof = logits.assign(**{"provider": ROOF, RATE: logits["roof"]}).drop_duplicates("V")
    ignored = _points(sweep(every, "kept"), 100 * every["ignored"], TIME, PEAK)
    gain = ignored[(ignored["kind"] == "linear") & ignored["provider"].isin(GAIN.keys())]
    found = {
        "ignored": ignored,
        "gain": gain.assign(provider=gain["provider"].map(GAIN)),
        "tokens": _points(sweep(every, "N"), every["N"], TIME, PEAK),
        "bandwidth": _points(pandas.concat([logits, roof]), every["V"], RATE),
        "training-step": DataFrame(result["training step"]),
    }
    return {name: data for name, data in found.items() if len(data)}


def distillation(rows: list[dict[str, Any]]) -> DataFrame:
    """The data of the picture of a run of `bench.distillation`."""
    every = DataFrame(rows).query("not compared").rename(columns={"loss": "provider"})
    every = every.assign(**{"kind": "distillation", TIME: every["ms"], PEAK: every["bytes"] / 2**20})
    return _points(every, every["V"], TIME, PEAK)


def budgets(result: dict[str, Any]) -> DataFrame:
    """The points of the picture of a run of `bench.budgets`. Times are relative to the largest budget's."""
    rows, curve = DataFrame(result["rows"]), DataFrame(result["predicted curve"])
    times = DataFrame(rows["ms of the processor"].tolist())
    measured = rows[["budget", "bytes", "ratio"]].assign(what="measured")
    measured = measured.join(times[["p20", "p80"]] / times["p50"].iloc[0])
    # The curve's budgets are evenly spaced.
    first, *_, last = rows["budget"].tolist()
    predicted = curve.assign(budget=numpy.linspace(first, last, len(curve)), what="predicted")
    every = pandas.concat([predicted, measured]).fillna(0.0)
    return every.assign(budget=every["budget"] / 2**20, bytes=every["bytes"] / 2**20)


def _points(rows: DataFrame, x: pandas.Series, *measures: str) -> DataFrame:
    """The points (x, measure, value) of every line that has at least two."""
    of = ["kind", "N", "V", "D", "provider", "x"]
    points = rows.assign(x=x).sort_values("x", kind="stable").melt(of, measures, var_name="measure").dropna()
    return points.groupby(["measure", "kind", "provider"]).filter(lambda line: len(line) > 1)


def draw(name: str, data: DataFrame, about: str, path: Path) -> None:
    """Draws and saves the picture of a name, with its data from `pictures`."""
    own = {"training-step": _training_step, "budgets": _budgets, "gain": _gain}.get(name)
    save(own(data, about) if own else _lines(name, data, about), path, data)


def save(figure: Figure, path: Path, data: DataFrame) -> None:
    figure.savefig(path, dpi=figure.dpi, facecolor="white", metadata={"Data": digest(data), "Software": None})


def digest(data: DataFrame) -> str:
    """A digest of a picture's data. It is stored in the picture, and a test compares it with the newest results."""
    return hashlib.sha256(json.dumps(data.to_dict("list")).encode()).hexdigest()[:16]


def _lines(name: str, data: DataFrame, about: str) -> Figure:
    """A column of panels for each kind of loss, times above peak memory."""
    measures, kinds = data["measure"].unique(), [kind for kind in TITLES if kind in set(data["kind"])]
    figure = Figure(dpi=110, figsize=(max(5.2 * len(kinds), 6.5), 3.1 * len(measures) + 1.3), layout="constrained")
    better = "Higher" if RATE in measures else "Lower"
    figure.suptitle(f"Forward and backward, bfloat16. {better} is better.\n{about}", fontsize=10)
    for kind, column in zip(kinds, figure.subplots(len(measures), len(kinds), squeeze=False).T, strict=True):
        own = data[data["kind"] == kind]
        for measure, axes in zip(measures, column, strict=True):
            _panel(axes, own[own["measure"] == measure], logarithmic=name == "tokens")
            axes.set(xlabel=AGAINST[name], ylabel=measure)
            if name == "ignored":
                axes.set_xlim(-3, 100)
        sizes = [f"{size}={own[size].iloc[0]}" for size in "NVD" if own[size].nunique() == 1 and own[size].any()]
        column[0].set_title(f"{TITLES[kind]}: {', '.join(sizes)}", fontsize=11)
        # The panels of a column have the same lines.
        column[-1].legend(*column[0].get_legend_handles_labels(), bbox_to_anchor=(0.5, -0.2), **LEGEND)
    return figure


def _gain(data: DataFrame, about: str) -> Figure:
    """One column of two panels, narrow and with large letters, as most visitors come with a phone."""
    figure = Figure(figsize=(4.2, 6.4), dpi=200, layout="constrained")
    N, V, D = data[["N", "V", "D"]].iloc[0]
    figure.suptitle(
        f"The loss from hidden states,\nforward and backward, bfloat16\nN={N}, V={V}, D={D}. Lower is better.",
        fontsize=11,
    )
    panels = figure.subplots(2, 1, sharex=True)
    for (measure, label), axes in zip({TIME: "milliseconds", PEAK: "peak MiB"}.items(), panels, strict=True):
        for provider, line in data[data["measure"] == measure].groupby("provider", sort=False):
            place = list(GAIN.values()).index(str(provider))
            style: dict[str, Any] = {"color": PEERS[place], "marker": MARKERS[place], "markersize": 5}
            if provider == "this package":
                style = {"color": OURS, "marker": "o", "linewidth": 3, "zorder": 3}
            axes.plot(line["x"], line["value"], label=provider, **style)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label, fontsize=11)
        axes.tick_params(labelsize=10)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("ignored tokens, %", fontsize=11)
    legend: dict[str, Any] = LEGEND | {"fontsize": 10, "loc": "outside lower center"}
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=2, **legend)
    panels[0].set_title(about.replace(", PyTorch", ",\nPyTorch", 1), fontsize=8)
    return figure


def _panel(axes: Axes, points: DataFrame, logarithmic: bool) -> None:
    peers = zip(PEERS, MARKERS, strict=True)
    lines = iter(OUR_LINES)
    ours = {name: next(lines) for name in reversed(points["provider"].unique()) if "fused_" in name}
    for provider, line in points.groupby("provider", sort=False):
        if provider == ROOF:
            style: dict[str, Any] = {"color": "black", "linestyle": ":"}
        elif provider in ours:
            style = {"color": OURS, "marker": "o", "linewidth": 2.5, "linestyle": ours[provider], "zorder": 3}
        else:
            style = dict(zip(("color", "marker"), next(peers), strict=True))
        axes.plot(line["x"], line["value"], label=provider, **style)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    elif len(points):
        axes.set_ylim(0, 1.08 * points["value"].max())
    axes.grid(alpha=0.3)


def _training_step(steps: DataFrame, about: str) -> Figure:
    V, T, D, layers = steps.loc[0, ["V", "T", "D", "layers"]]
    figure = Figure(dpi=110, figsize=(6.5, 3.9), layout="constrained")
    figure.suptitle(
        f"Peak memory of a training step above model and gradients, float32\nLlama of {layers} layers, {T} tokens, "
        f"V={V}, D={D}\n{about}", fontsize=10,
    )  # fmt: skip
    held = steps.assign(MiB=steps["bytes"] / 2**20).pivot(index="ignored", columns="way", values="MiB")
    held = held.reindex(columns=WAYS).set_axis(["transformers", "patch_model(model)"], axis="columns")
    held.index = [f"{share:.0%} of the tokens ignored" for share in held.index]
    axes = held.plot.bar(
        ax=figure.subplots(), color=[PEERS[0], OURS], edgecolor="white", width=0.72, rot=0, ylabel="MiB",
        ylim=(0, 1.12 * held.max().max()),
    )  # fmt: skip
    for bars in axes.containers:
        axes.bar_label(bars, fmt=lambda held: f"{held:.0f} MiB" if held else "", padding=2, fontsize=9)
    logits = 4 * T * V / 2**20
    axes.axhline(logits, color="black", linestyle=":", label=f"the logits alone, {logits:.0f} MiB")
    axes.legend(bbox_to_anchor=(0.5, -0.12), ncols=3, **LEGEND)
    return figure


def _budgets(data: DataFrame, about: str) -> Figure:
    """Time above peak memory, against the budget."""
    figure = Figure(dpi=110, figsize=(6.5, 6.2), layout="constrained")
    figure.suptitle(f"The loss from hidden states at five memory budgets\n{about}", fontsize=10)
    predicted, measured = (data[data["what"] == what] for what in ("predicted", "measured"))
    time, peak = figure.subplots(2, 1, sharex=True)
    spread = [measured["ratio"] - measured["p20"], measured["p80"] - measured["ratio"]]
    dots: dict[str, Any] = {
        "color": OURS,
        "fmt": "o",
        "capsize": 3,
        "label": "measured: median, 20th to 80th percentile",
    }
    for axes, value, error in ((time, "ratio", spread), (peak, "bytes", None)):
        line = "predicted by the planner"
        axes.step(predicted["budget"], predicted[value], where="mid", color=PEERS[0], linewidth=1.5, label=line)
        axes.errorbar(measured["budget"], measured[value], yerr=error, **dots)
        axes.grid(alpha=0.3)
    time.set(ylabel="time of the processor,\nrelative to one block")
    peak.set(xlabel="memory budget, MiB", ylabel=PEAK)
    peak.set_ylim(bottom=0)
    peak.legend(*time.get_legend_handles_labels(), bbox_to_anchor=(0.5, -0.18), ncols=2, **LEGEND)
    return figure
