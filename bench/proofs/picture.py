"""A picture of predicted shares of the memory roof: a panel for each vocabulary, a bar for each kernel and chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.speed.plots import OURS, PEERS, save

#: The vocabularies that the picture shows, some of those that have predictions.
VOCABULARIES = (32000, 128256)

PREDICTIONS = "predictions, not measurements"

#: The colours of this package's kernels: forward, backward, one pass.
SHADES = (OURS, "#e69f00", "#f0c987")


def rows(proofs: dict[str, Any]) -> list[dict[str, Any]]:
    """The predictions that the picture shows, of what `bench.proofs` wrote."""
    return [row for row in proofs[PREDICTIONS] if row["V"] in VOCABULARIES]


def draw(proofs: dict[str, Any], about: str, file: Path) -> None:
    from matplotlib.figure import Figure

    found = rows(proofs)
    chips = list(dict.fromkeys(row["chip"] for row in found))
    kernels = list(dict.fromkeys(row["kernel"] for row in found))
    vocabularies = sorted({row["V"] for row in found})
    figure = Figure(figsize=(10, 2.4 * len(vocabularies) + 1.6), layout="constrained")
    figure.suptitle(
        "PREDICTION from machine code and data sheets, NOT A MEASUREMENT\n"
        f"share of the memory roof, bfloat16; {about}", fontsize=10,
    )  # fmt: skip
    ours = [kernel for kernel in kernels if kernel.startswith("fused_ignore_ce")]
    others = [kernel for kernel in kernels if kernel not in ours]
    colours = {**dict(zip(ours, SHADES, strict=False)), **dict(zip(others, PEERS, strict=False))}
    width = 0.85 / len(kernels)
    panels = figure.subplots(len(vocabularies), 1, sharex=True, squeeze=False)[:, 0]
    for axes, V in zip(panels, vocabularies, strict=True):
        for number, kernel in enumerate(kernels):
            own = {
                row["chip"]: row["share of the memory roof"]
                for row in found
                if (row["kernel"], row["V"]) == (kernel, V)
            }
            places = [chips.index(chip) + (number - (len(kernels) - 1) / 2) * width for chip in own]
            axes.bar(places, list(own.values()), width, label=kernel.replace("_kernel", ""), color=colours[kernel])
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.1)
        axes.set_ylabel(f"V = {V}")
        axes.set_xticks(range(len(chips)), chips)
    panels[-1].legend(ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save(figure, file, found)
