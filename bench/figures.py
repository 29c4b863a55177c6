"""Writes the figures of README and docs and draws their pictures, from result files: `python -m bench.figures`.

In a page, a generated block stands between `<!-- figures: NAME -->` and `<!-- end -->`. NAME is the name of one of the
functions below. They write links relative to the README; in the pages of docs/, links are rewritten.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas
from pandas import DataFrame

from fused_ignore_ce.tools.cost import linear_cost

from .comparison import tables as comparison
from .machine import ROOT
from .proofs import picture
from .proofs.pages import PREDICTED, one_passes, predictions
from .reading import Results, Row, code, embedded, heading, link, size, table, where, written
from .speed import plots
from .speed.memory import WAYS
from .speed.providers import PROVIDERS
from .speed.scaling import VARIED, losses
from .speed.workload import MODELS

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

#: This package's losses, of logits and from hidden states.
OURS = [providers[-1].name for providers in PROVIDERS.values()]

#: The share of ignored tokens in the README's table of time and memory.
SHARE = 0.75

#: The target of a link from the README to a file of the repository.
LINK = re.compile(r"(?<=\]\()(?:docs|bench)/[^)#\s]+")

BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine(results: Results) -> str:
    name, result = results.newest("run", "rows")
    header = result["header"]
    return (
        f"Times and peak memory come from one run of `{header['command']}`, where no other file is named: "
        f"{where(header)} ({header['simd']}). Its result file has every figure with its spread, the machine's own roof "
        f"and a list of what was left out: {link(name)}."
    )


def headline(results: Results) -> str:
    """The README's table of time and memory."""
    name, result = results.newest("run", "rows")
    base = _base(result).query("dtype == 'bfloat16' and ignored == @SHARE").set_index(["kind", "provider"])
    lines = {}
    for kind, what in (("logits", "loss from logits"), ("linear", "loss from hidden states")):
        first, *others, last = PROVIDERS[kind]
        shown = (first, *(provider for provider in others if provider.compiled), last)
        own = base.reindex([(kind, provider.name) for provider in shown])
        lines[f"{what}: time"] = [*written(own["ms.p50"], "{:.0f} ms".format)]
        lines[f"{what}: peak memory"] = [*written(own["bytes"], size)]
    steps = results.newest("run", "training step")[1]["training step"]
    held = DataFrame(steps).query("ignored == @SHARE").set_index("way")["bytes"].reindex(WAYS)
    plain, fused = written(held, size)
    lines["training step of a model: peak memory"] = [plain, "not measured", fused]
    N, V, D = base[["N", "V", "D"]].max()
    text = (
        f"{SHARE:.0%} of the tokens are ignored. The losses were measured forward and backward, with N={N} tokens, "
        f"V={V} classes, D={D} features, in bfloat16. Plain is `F.cross_entropy(logits.float(), labels)`. The training "
        f"step is that of {_model(steps[0])}, in float32; its time was not measured. Memory does not include inputs, "
        "parameters and their gradients. So 0 MiB means that a loss writes almost nothing but the gradient of its "
        f"input. Measured on {where(result['header'])}: {link(name)}."
    )
    cells = DataFrame.from_dict(lines, orient="index")
    return f"{table(cells, ['plain', 'torch.compile of it', 'this package'])}\n\n{text}"


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


def _model(step: Row) -> str:
    return f"a Llama of {step['layers']} layers, {step['T']} tokens, V={step['V']}, D={step['D']}"


def _base(result: Row) -> DataFrame:
    """Forward and backward at the base shape."""
    return losses(result["rows"], result["memory"]).query("shape == 'base' and direction == 'both'")


def _ratios(result: Row, kind: str, dtypes: Sequence[str], shares: Sequence[float]) -> str:
    """Ratios at the base shape, a column per dtype and share; the last column is peak memory for the first of them."""
    rows = _base(result).query("kind == @kind")
    sizes = [f"{name}={rows[name].iloc[0]}" for name in "NVD" if rows[name].any()]
    columns = [*itertools.product(dtypes, shares)]
    found = rows.pivot(index="provider", columns=["dtype", "ignored"], values=["ratio", "bytes"])
    found = found.reindex(columns=[*(("ratio", *column) for column in columns), ("bytes", *columns[0])])
    found = found.reindex([provider.name for provider in PROVIDERS[kind]]).dropna(how="all").rename(code)
    cells = written(found[["ratio"]], "{:.2f}".format).join(written(found[["bytes"]], size))
    several = len(dtypes) > 1
    names = [f"{dtype} {ignored:.0%} ignored" if several else f"{ignored:.0%} ignored" for dtype, ignored in columns]
    text = f"{', '.join(sizes if several else [*sizes, *dtypes])}, ratios of medians to the first:"
    return f"{text}\n\n{table(cells, [*names, f'peak memory, {dtypes[0]}, {shares[0]:.0%}'])}"


def logits(results: Results) -> str:
    return _ratios(results.newest("run", "rows")[1], "logits", ["bfloat16"], [0.0, 0.5, 0.75, 0.95])


def linear(results: Results) -> str:
    _, result = results.newest("run", "rows")
    slow = [gate for gate in result["gates"] if gate["status"] == "slow"]
    notes = "".join(f"\n\n{code(g['provider'])} in {g['dtype']} was not measured: {g['reason']}." for g in slow)
    return _ratios(result, "linear", ["bfloat16", "float32"], [0.0, 0.75]) + notes


def models(results: Results) -> str:
    """Ratios of this package's losses at the sizes of models. Models of equal vocabulary share the loss of logits."""
    rows = losses(results.newest("run", "rows")[1]["rows"]).query("direction == 'both' and shape in @MODELS")
    rows = rows[rows["provider"].isin(OURS)].set_index(["kind", "V", "D", "ignored"])
    lines = {}
    for name, (V, D) in MODELS.items():
        own = rows.reindex((kind, V, D * (kind == "linear"), share) for kind in PROVIDERS for share in (0.0, 0.75))
        tokens = " / ".join(written(own["N"], "{:.0f}".format)[::2])
        lines[f"{name}, {V} x {D}"] = [tokens, *written(own["ratio"], "{:.2f}".format)]
    head = ("tokens, logits / linear", "logits, 0% ignored", "75%", "linear, 0% ignored", "75%")
    return table(DataFrame.from_dict(lines, orient="index"), head)


def scaling(results: Results) -> str:
    """The exponents of the newest run that had time to vary all sizes; if none had, those of the newest run."""
    complete = (run for run in results.files["run"].items() if {fit["varied"] for fit in run[1]["fits"]} >= {*VARIED})
    name, result = next(complete, None) or results.newest("run", "fits")
    exponents = DataFrame(result["fits"]).pivot(index=["kind", "provider"], columns="varied", values="exponent")
    shown = [(kind, provider.name) for kind, own in PROVIDERS.items() for provider in (own[0], own[-1])]
    cells = written(exponents.reindex(index=shown, columns=VARIED).droplevel("kind"), "{:.2f}".format)
    drawn = table(cells.rename(code), ["tokens", "vocabulary", "features", "kept tokens of a batch"])
    return f"{drawn}\n\n{where(result['header'])}: {link(name)}."


def training_step(results: Results) -> str:
    rows = results.newest("run", "training step")[1]["training step"]
    text = (
        f"{_model(rows[0])}, float32, forward and backward; peak memory above the model and its gradients. Time was "
        f"not measured. The logits alone would be {size(4 * rows[0]['T'] * rows[0]['V'])}."
    )
    held = DataFrame(rows).pivot(index="way", columns="ignored", values="bytes").reindex(WAYS)
    cells = written(held, size).set_axis(["transformers", "`patch_model(model)`"])
    drawn = embedded("training-step", "Peak memory of a training step, plain and patched")
    return f"{text}\n\n{table(cells, [f'{share:.0%} ignored' for share in held.columns])}\n\n{drawn}"


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


def ignored(results: Results) -> str:
    return embedded("ignored", "Time and peak memory of the losses against the share of ignored tokens")


def growth(results: Results) -> str:
    return (
        f"{embedded('tokens', 'Time and peak memory of the losses against the number of tokens')}\n"
        f"{embedded('bandwidth', 'Bandwidth of the loss of logits against the vocabulary')}"
    )


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
    machine, headline, coverage, ignored, logits, linear, models, scaling, growth, training_step, traffic, compiled,
    predictions, one_passes, memory, budgets, distributed, compared, comparisons, distillation,
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
    return found | {PREDICTED: (picture.rows(predicted), f"commit {predicted['header']['commit'][:7]}")}


if __name__ == "__main__":
    found = Results()
    for name, (data, about) in shown(found).items():
        draw = picture.draw if name == PREDICTED else partial(plots.draw, name)
        draw(data, about, PICTURES / f"{name}.png")
    for page in PAGES:
        page.write_text(rewritten(page, page.read_text(), found))
