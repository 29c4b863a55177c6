"""Predictions as blocks of the pages that `bench.figures` writes, from result files."""

from __future__ import annotations

from pandas import DataFrame

from ..reading import Results, embedded, link, table
from . import picture

#: The vocabulary at which the pages have predictions.
PREDICTED_V = 128256

#: The name of the picture of predictions.
PREDICTED = "predicted-roof"

#: Figures of both one passes, and how they are written.
PAIRS = {
    "instructions_a_logit": ".1f",
    "registers": "d",
    "reads": ".2f",
    "writes": ".2f",
    "predicted_milliseconds": ".2f",
}


def predictions(results: Results) -> str:
    """Shares of the memory roof, and how far the model is off for published times of other kernels."""
    name, found = results.newest("predictions", picture.PREDICTIONS)
    rows = DataFrame(found[picture.PREDICTIONS]).query("V == @PREDICTED_V")
    rows["cell"] = rows[picture.SHARE].map("{:.2f}, ".format) + rows["bound"]
    cells = rows.pivot_table("cell", "chip", "kernel", aggfunc="first", sort=False).fillna("-")
    head = [kernel.replace("fused_ignore_ce ", "ours, ").replace("_kernel", ",") for kernel in cells.columns]
    text = f"{found['note']} Shares of the memory roof at V={PREDICTED_V}, and what bounds them most ({link(name)}):"
    drawn = embedded(PREDICTED, "A prediction, not a measurement: shares of the memory roof")
    return "\n\n".join([text, table(cells, head), drawn, _published(DataFrame(found["published"]))])


def _published(every: DataFrame) -> str:
    """The table of published times, and a sentence about those that it leaves out."""
    rows = every[every["shown"]].set_index("chip")
    cells = rows[["N x V", "kernel", "published by"]].copy()
    for column in ("published ms", "predicted ms"):
        cells[column] = rows[column].map("{:.3f}".format)
    for column in ("error", "error if left out"):
        cells[column] = rows[column].map("{:+.1%}".format)
    sizes = every[["error", "error if left out"]].abs()
    (half, half_left), (most, most_left) = sizes.median(), sizes.max()
    return (
        f"The same model, for times that others measured and published:\n\n{table(cells, list(cells.columns))}\n\n"
        f"Of all {len(every)} published times that it was fitted to, the model is off by {half:.1%} at the median and "
        f"{most:.1%} at most; by {half_left:.1%} and {most_left:.1%} where each series was left out of the fit in turn."
    )


def one_passes(results: Results) -> str:
    """Both one passes on every chip, with the times that others published for the same work."""
    name, found = results.newest("one_passes", "rows")
    rows, others = DataFrame(found["rows"]), DataFrame(found["published"])
    of = ["options", "dtype", "N", "V", "chip", "arch"]
    lines = {}
    for key, both in rows.groupby(of, sort=False):
        before, after = (both[both["kernel"] == kernel].iloc[0] for kernel in ("one pass", "on chip"))
        options, dtype, N, V, chip, arch = key
        pairs = [f"{before[name]:{form}} / {after[name]:{form}}" for name, form in PAIRS.items()]
        same = others.query("N == @N and V == @V and dtype == @dtype and chip == @chip")
        same = same if options == "plain" else same[:0]
        known = [f"{each.kernel} {each.milliseconds:.2f} ({each.source})" for each in same.itertuples()]
        lines[f"{options}, {dtype}, {N} x {V}; {chip}, {arch}"] = [*pairs, "; ".join(known) or "-"]
    head = ("instructions", "registers", "reads", "writes", "predicted ms", "published ms of others")
    text = (
        "Each pair is the one pass that reads its rows again from the L2 cache / the one that keeps them on the chip, "
        "which has taken its place. Instructions a logit are those in loops. Reads and writes of a logit in device "
        "memory are those of the executed code, as if there were no cache. Times are predictions, with the errors "
        f"above, and not measurements: nothing ran on a GPU ({link(name)})."
    )
    return f"{text}\n\n{table(DataFrame.from_dict(lines, orient='index'), head)}"


def traffic(results: Results) -> str:
    name, result = results.newest("traffic", "rows")
    rows = DataFrame(result["rows"]).query("ignored == 0.5").set_index(["case", "passes"])
    case = rows.index[0][0]
    moved = rows.loc[[case, f"{case} grad_in_forward=True"], ["kept", "of ignored"]].droplevel("case")
    cells = moved.map(lambda row: f"{row['read']:.3f} reads, {row['written']:.3f} writes")
    drawn = table(cells, ["kept row", "ignored row"])
    return f"{case}, half of the rows ignored, sm_{result['header']['arch']} ({link(name)}):\n\n{drawn}"


def compiled(results: Results) -> str:
    """What was compiled, and whether a fault was found in it."""
    name, found = results.newest_proofs()
    which = "shapes of models" if found["quick"] else "every tile size that a launch can choose"
    judged = (
        "No kernel spills registers to memory. On NVIDIA's targets, long aligned rows are read by wide loads, and no "
        "main kernel has more instructions than its limit allows."
    )
    if found["faults"]:
        judged = (
            f"{found['spilling'] or 'None'} of them spill registers, {found['narrow'] or 'none'} use narrower loads "
            f"than possible; the result file lists all {len(found['faults'])} that cost speed."
        )
    return (
        f"{found['kernels']} kernels ({which}) were compiled for {', '.join(found['targets'])} in "
        f"{', '.join(found['dtypes'])}, without a GPU. {judged} ({found['header']['date']}, commit "
        f"{found['header']['commit'][:7]}, {link(name)})."
    )
