"""A picture of predicted shares of the memory roof: a panel for each vocabulary, a bar for each kernel and chip."""

from __future__ import annotations

from pathlib import Path

from .predicting import NOTE, ROWS, Row


def draw(rows: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = list(dict.fromkeys(row.prediction.chip for row in rows))
    kernels = list(dict.fromkeys((row.library, row.kernel) for row in rows))
    vocabularies = sorted({row.V for row in rows})
    figure, panels = pyplot.subplots(
        len(vocabularies), 1, figsize=(11, 3 * len(vocabularies)), sharex=True, squeeze=False
    )
    width = 0.85 / len(kernels)
    for panel, V in zip(panels[:, 0], vocabularies, strict=True):
        for number, (library, kernel) in enumerate(kernels):
            shares = {
                r.prediction.chip: r.prediction.share
                for r in rows
                if (r.library, r.kernel, r.V) == (library, kernel, V)
            }
            places = [index + (number - (len(kernels) - 1) / 2) * width for index in range(len(chips))]
            panel.bar(places, [shares.get(chip, 0) for chip in chips], width, label=f"{library} {kernel}")
        panel.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        panel.set_ylim(0, 1.1)
        panel.set_ylabel(f"V = {V}")
        panel.set_xticks(range(len(chips)), chips)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(kernels), fontsize=8, loc="lower center")
    figure.suptitle(f"Share of the memory roof, bfloat16, {ROWS} rows. {NOTE}")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
