"""A picture of predicted shares of the memory roof: a panel for each vocabulary, a bar for each kernel and chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pandas import DataFrame

from bench.speed.plots import LEGEND, OURS, PEERS, save

#: The vocabularies that the picture shows. More have predictions.
VOCABULARIES = (32000, 128256)

PREDICTIONS = "predictions, not measurements"
SHARE = "share of the memory roof"

#: The colours of this package's kernels: forward, backward, one pass.
SHADES = (OURS, "#e69f00", "#f0c987")


def rows(proofs: dict[str, Any]) -> DataFrame:
    """The predictions that the picture shows, from a result of `bench.proofs`."""
    found = DataFrame(proofs[PREDICTIONS])[["chip", "V", "kernel", SHARE]].query("V in @VOCABULARIES")
    return found.assign(kernel=found["kernel"].str.replace("_kernel", ""))


def draw(found: DataFrame, about: str, file: Path) -> None:
    ours, others = iter(SHADES), iter(PEERS)
    colours = {name: next(ours if "fused_ignore_ce" in name else others) for name in found["kernel"].unique()}
    panels = found["V"].nunique()
    figure = Figure(figsize=(10, 2.4 * panels + 1.6), layout="constrained")
    figure.suptitle(
        "PREDICTION from machine code and data sheets, NOT A MEASUREMENT\n"
        f"share of the memory roof, bfloat16; {about}", fontsize=10,
    )  # fmt: skip
    every = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (V, own) in zip(every, found.groupby("V"), strict=True):
        shares = own.pivot_table(SHARE, "chip", "kernel", sort=False)
        shares.plot.bar(ax=axes, color=colours, width=0.85, rot=0, ylim=(0, 1.1), legend=False)
        axes.set(xlabel="", ylabel=f"V = {V}")
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.legend(bbox_to_anchor=(0.5, -0.15), ncols=3, **LEGEND)
    save(figure, file, found)
