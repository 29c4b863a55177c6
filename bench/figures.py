"""Writes the figures of README and docs and draws their pictures, from result files: `python -m bench.figures`.

In a page, a generated block stands between `<!-- figures: NAME -->` and `<!-- end -->`. NAME is the name of one of the
functions below. They write links relative to the README; in the pages of docs/, links are rewritten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas
from pandas import DataFrame

from fused_ignore_ce.tools.cost import linear_cost

from .comparison import tables as comparison
from .machine import ROOT
from .proofs import pages as proofs
from .proofs import picture
from .reading import Results, embedded, heading, link, size, table, where
from .speed import pages, plots

PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("measured.md", "comparison.md", "concepts/memory.md", "guides/distillation.md")
    ),
)
PICTURES = ROOT / "docs" / "pictures"
COVERAGE = ROOT / "docs" / "transformers-coverage.md"

#: The name of the picture of memory budgets.
BUDGETS = "budgets"

#: The target of a link from the README to a file of the repository.
LINK = re.compile(r"(?<=\]\()(?:docs|bench)/[^)#\s]+")

BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def coverage(results: Results) -> str:
    """A line about the classes of transformers, from the page that `make sweep` writes."""
    text = COVERAGE.read_text()
    written = re.search(r"^Written by .*; (torch \S+), (transformers \S+), CPU, (\S+)\.$", text, re.MULTILINE)
    rows = re.findall(r"^\| ([A-Z_0-9]+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    if written is None or not rows:
        raise SystemExit(f"{COVERAGE.name} has no table of classes: make sweep")
    named, run, equal = (sum(int(row[column]) for row in rows) for column in (1, 2, 3))
    _, _, causal, same = next(row for row in rows if row[0] == "CAUSAL_LM")
    missing = len(re.findall(r"^\|[^|]+\| +\| not built \| ImportError", text, re.MULTILINE))
    return (
        f"**{same} of {causal} causal language models, and {equal} of {run} model classes in all, have the same loss "
        f"and the same gradients after `patch_model`** ({written[2]}, {written[1]}, {written[3]}). {named - run} more "
        f"classes of transformers could not be trained, patched or not: {missing} need a package that was not "
        f"installed, and {named - run - missing} take no labels or run only beside another model. [The "
        "list](docs/transformers-coverage.md) has every class, with the reason where it was not trained."
    )


def budgets(results: Results) -> str:
    """Time and peak memory of the linear loss at five budgets, and a picture of them."""
    name, found = results.newest("budgets", "rows")
    case = found["case"]
    lines = {
        size(row["budget"]): [
            f"{row['plan']}, {row['kept blocks']} of {row['blocks']} kept" if row["blocks"] > 1 else row["plan"],
            *map("{:.2f}".format, (row["products"], row["predicted ratio"], row["ratio"])),
            *map(size, (row["predicted bytes"], row["bytes"])),
        ]
        for row in found["rows"]
    }
    head = ("plan", "products", "predicted time", "measured time", "predicted peak", "measured peak")
    text = (
        f"N={case['N']}, V={case['V']}, D={case['D']}, {case['dtype']}, forward and backward. Times are those of the "
        f"processor on one thread, relative to the first, medians of {found['rounds']} rounds in which budgets took "
        f"turns. Peaks are medians of {found['processes']} fresh processes, less the gradients; they are below what is "
        "predicted, because temporaries are gone before all gradients are written. "
        f"{where(found['header'])}; the machine's load was {found['header']['load']:.0f}: {link(name)}."
    )
    drawn = embedded(BUDGETS, "Time against peak memory at five memory budgets, measured and predicted")
    return f"{table(DataFrame.from_dict(lines, orient='index'), head)}\n\n{text}\n\n{drawn}"


def distributed(results: Results) -> str:
    file, found = results.newest("distributed", "rows")
    rows = DataFrame(found["rows"])
    rows["sent"] = rows["bytes_per_token"].map(lambda n: f"{n / 1024:.0f} KiB" if n >= 10240 else f"{n:.0f} B")
    rows["held"] = rows["peak_bytes"].map(size)
    cells = rows.pivot_table(["sent", "held"], "name", "ranks", aggfunc="first", sort=False)[["sent", "held"]]
    text = f"N={found['N']}, V={found['V']}, D={found['D']}, float32, {found['ignored']:.0%} ignored ({link(file)}):"
    head = [f"{what}, {ranks} ranks" for what, ranks in cells.columns]
    return f"{text}\n\n{table(cells.rename('`{}`'.format), head)}"


def distillation(results: Results) -> str:
    """The table of distillation losses and their picture."""
    name, found = results.newest("distillation", "rows")
    rows = DataFrame(found["rows"]).query("compared")
    rows["peak"] = rows["bytes"].map(size)
    for column, form in (("ratio", "{:.2f}"), ("error", "{:.0e}"), ("gradient error", "{:.0e}")):
        rows[column] = rows[column].map(form.format)
    shares = rows["ignored"].unique()
    cells = [rows[rows["ignored"] == share].set_index("loss")[["ratio", "peak"]] for share in shares]
    of_first = rows[rows["ignored"] == shares[0]].set_index("loss")[["error", "gradient error"]]
    head = [f"{what}, {share:.0%} ignored" for share in shares for what in ("time", "memory")]
    drawn = table(pandas.concat([*cells, of_first], axis=1), [*head, "error of the loss", "error of the gradients"])
    N, V, D = rows[["N", "V", "D"]].max()
    text = (
        f"The Jensen-Shannon divergence, forward and backward, N={N} tokens, V={V} classes, D={D} features (the "
        f"teacher {2 * D}), bfloat16. Times are processor times of one thread, as ratios of medians to the first line. "
        "Memory is the peak above the inputs and their gradients. Errors are relative to the largest value that "
        f"float64 gives for the same inputs. Measured on {where(found['header'])}: {link(name)}."
    )
    return f"{text}\n\n{drawn}\n\n{embedded('distillation', 'Time and peak memory of distillation, plain and fused')}"


def compared(results: Results) -> str:
    """The README's comparison of packages."""
    return comparison.short(results.newest("comparison", "cells")[1])


def comparisons(results: Results) -> str:
    """Every row of the comparison, with the reasons for its answers."""
    return comparison.long(*results.newest("comparison", "cells"))


def memory(results: Results) -> str:
    """Memory by formulas, which tests check against measured peaks. No result file is read."""
    N, V, D = 8192, 128256, 4096
    whole, half = linear_cost(N, V, D), linear_cost(N, V, D, memory_budget=2**29)
    chunks = 2 * 1024 * V + 4 * V * D
    held = {
        "`F.cross_entropy(F.linear(h, w).float(), y)`":
            "log-softmax and two gradients in float32, before there are others: `3 x 4NV - s(N + V)D`",
        whole.plan.plan: "`sNV`",
        "token chunks of c rows":
            "`scV + 4VD` (nothing for `4VD` where the head's gradient is float32 or not wanted)",
        f"{half.plan.plan} of b classes": "`sNb + 4ND + 48 NV/b`",
    }  # fmt: skip
    example = [
        f"{whole.plain_bytes / 2**30:.1f} GiB", f"{whole.plan.bytes / 2**30:.1f} GiB",
        f"{chunks / 2**30:.1f} GiB, c=1024", f"{half.plan.bytes / 2**30:.2f} GiB, b={half.plan.chunk}",
    ]  # fmt: skip
    cells = DataFrame({"held": held}).assign(example=example)
    return table(cells, ["held at the peak", f"N={N}, V={V}, D={D}, bf16"])


FUNCTIONS = (
    pages.machine, pages.headline, pages.gain, pages.ignored, pages.logits, pages.linear, pages.models, pages.scaling,
    pages.growth, pages.training_step, proofs.traffic, proofs.compiled, proofs.predictions, proofs.one_passes, coverage,
    memory, budgets, distributed, compared, comparisons, distillation,
)  # fmt: skip
BLOCKS: dict[str, Callable[[Results], str]] = {f.__name__.replace("_", "-"): f for f in FUNCTIONS}


def rewritten(page: Path, text: str, results: Results) -> str:
    """A page's text with every block generated anew."""

    def block(found: re.Match[str]) -> str:
        new = LINK.sub(lambda target: os.path.relpath(ROOT / target[0], page.parent), BLOCKS[found[2]](results))
        return f"{found[1]}{new}\n{found[3]}"

    return BLOCK.sub(block, text)


def shown(results: Results) -> dict[str, tuple[DataFrame, str]]:
    """For each picture, by its name: the data that it shows, and a line about the newest run that has them."""
    found: dict[str, tuple[DataFrame, str]] = {}
    for result in results.files["run"].values():
        found = {name: (data, heading(result["header"])) for name, data in plots.pictures(result).items()} | found
    _, predicted = results.newest("predictions", picture.PREDICTIONS)
    _, distilled = results.newest("distillation", "rows")
    found["distillation"] = plots.distillation(distilled["rows"]), heading(distilled["header"])
    _, budgeted = results.newest("budgets", "rows")
    found[BUDGETS] = plots.budgets(budgeted), heading(budgeted["header"])
    return found | {proofs.PREDICTED: (picture.rows(predicted), f"commit {predicted['header']['commit'][:7]}")}


if __name__ == "__main__":
    found = Results()
    for name, (data, about) in shown(found).items():
        draw = picture.draw if name == proofs.PREDICTED else partial(plots.draw, name)
        draw(data, about, PICTURES / f"{name}.png")
    for page in PAGES:
        page.write_text(rewritten(page, page.read_text(), found))
