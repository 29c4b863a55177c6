"""Writes the figures of README and docs and draws their pictures, from result files: `python -m bench.figures`.

In a page, a generated block stands between `<!-- figures: NAME -->` and `<!-- end -->`. NAME is the name of one of the
functions below. They write links as the README has them; those of the pages in docs/ are rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_ignore_ce.cost import linear_cost

from .comparison import tables as comparison
from .machine import ROOT
from .proofs import picture
from .reading import Results, Row, code, embedded, find, heading, link, peak, ratio, size, table, where
from .speed import plots
from .speed.memory import WAYS
from .speed.providers import PROVIDERS
from .speed.scaling import VARIED
from .speed.workload import MODELS

PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "comparison.md")
PICTURES = ROOT / "docs" / "pictures"
COVERAGE = ROOT / "docs" / "transformers-coverage.md"

#: The vocabulary at which the pages have predictions.
PREDICTED_V = 128256

#: The name of the picture of predictions.
PREDICTED = "predicted-roof"

#: The share of ignored tokens of which the README's sentences speak.
SHARE = 0.75

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
    lines = []
    for kind, what in (("logits", "loss from logits"), ("linear", "loss from hidden states")):
        rows = _base_rows(result, kind)
        baseline, *others, ours = PROVIDERS[kind]
        compiled = next(provider for provider in others if provider.compiled)
        own = [find(rows, provider=p.name, dtype="bfloat16", ignored=SHARE) for p in (baseline, compiled, ours)]
        lines.append((f"{what}: time", *(f"{row['ms']['p50']:.0f} ms" if row else "-" for row in own)))
        lines.append((f"{what}: peak memory", *(peak(result, row) for row in own)))
    steps = results.newest("run", "training step")[1]["training step"]
    step = {row["way"]: size(row["bytes"]) for row in steps if row["ignored"] == SHARE}
    plain, fused = (step.get(way, "-") for way in WAYS)
    lines.append(("training step of a model: peak memory", plain, "not measured", fused))
    head = ("", "plain", "torch.compile of it", "this package")
    sizes = f"N={rows[0]['N']} tokens, V={rows[0]['V']} classes, D={rows[0]['D']} features"
    text = (
        f"{SHARE:.0%} of the tokens are ignored. The losses: forward and backward, {sizes}, bfloat16; plain is "
        f"`F.cross_entropy(logits.float(), labels)`. The training step: {_model(steps[0])}, float32. Memory "
        f"does not include inputs, parameters and their gradients. Measured on {where(result['header'])}: {link(name)}."
    )
    return f"{table(head, lines)}\n\n{text}"


def coverage(results: Results) -> str:
    """A line about the classes of transformers, from the page that `make sweep` writes."""
    text = COVERAGE.read_text()
    written = re.search(r"^Written by .*; (torch \S+), (transformers \S+), CPU, (\S+)\.$", text, re.MULTILINE)
    rows = re.findall(r"^\| ([A-Z_0-9]+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    if written is None or not rows:
        raise SystemExit(f"{COVERAGE.name} has no table of classes: make sweep")
    named, run, equal = (sum(int(row[column]) for row in rows) for column in (1, 2, 3))
    _, _, causal, same = next(row for row in rows if row[0] == "CAUSAL_LM")
    return (
        f"**{same} of {causal} causal language models, and {equal} of {run} classes in all, have the same loss and the "
        f"same gradients after `patch_model`** ({written[2]}, {written[1]}, {written[3]}; another {named - run} "
        f"could not be run even unpatched): [the list](docs/transformers-coverage.md)."
    )


def _model(step: Row) -> str:
    return f"a Llama of {step['layers']} layers, {step['T']} tokens, V={step['V']}, D={step['D']}"


def _base_rows(result: Row, kind: str) -> list[Row]:
    """Forward and backward at the base shape."""
    return [r for r in result["rows"] if (r["kind"], r["shape"], r["direction"]) == (kind, "base", "both")]


def _base(result: Row, kind: str, columns: list[tuple[str, float]]) -> str:
    """Ratios at the base shape by (dtype, ignored), and peak memory in the first of these columns."""
    rows = _base_rows(result, kind)
    sizes = f"N={rows[0]['N']}, V={rows[0]['V']}" + (f", D={rows[0]['D']}" if rows[0]["D"] else "")
    lines = []
    for provider in PROVIDERS[kind]:
        own = [find(rows, provider=provider.name, dtype=dtype, ignored=ignored) for dtype, ignored in columns]
        if any(own):
            lines.append((code(provider.name), *map(ratio, own), peak(result, own[0])))
    dtype, *others = sorted({dtype for dtype, _ in columns})
    names = [f"{dtype} {ignored:.0%} ignored" if others else f"{ignored:.0%} ignored" for dtype, ignored in columns]
    text = f"{sizes}, {'' if others else f'{dtype}, '}ratios of medians to the first:"
    return f"{text}\n\n{table(('', *names, f'peak memory, {columns[0][0]}, {columns[0][1]:.0%}'), lines)}"


def logits(results: Results) -> str:
    return _base(results.newest("run", "rows")[1], "logits", [("bfloat16", share) for share in (0.0, 0.5, 0.75, 0.95)])


def linear(results: Results) -> str:
    _, result = results.newest("run", "rows")
    slow = [gate for gate in result["gates"] if gate["status"] == "slow"]
    notes = "".join(f"\n\n{code(g['provider'])} in {g['dtype']} was not measured: {g['reason']}." for g in slow)
    columns = [(dtype, share) for dtype in ("bfloat16", "float32") for share in (0.0, 0.75)]
    return _base(result, "linear", columns) + notes


def models(results: Results) -> str:
    """Ratios of this package's losses at the sizes of models. Models of one vocabulary share their logits' figures."""
    rows = [r for r in results.newest("run", "rows")[1]["rows"] if r["direction"] == "both" and r["shape"] in MODELS]
    lines = []
    for name, (V, D) in MODELS.items():
        cells: list[str] = []
        tokens: list[str] = []
        for kind, providers in PROVIDERS.items():
            own = {"kind": kind, "V": V, "D": D if kind == "linear" else 0, "provider": providers[-1].name}
            found = [find(rows, **own, ignored=share) for share in (0.0, 0.75)]
            cells += map(ratio, found)
            tokens.append(str(found[0]["N"]) if found[0] else "-")
        lines.append((f"{name}, {V} x {D}", " / ".join(tokens), *cells))
    head = ("", "tokens, logits / linear", "logits, 0% ignored", "75%", "linear, 0% ignored", "75%")
    return table(head, lines)


def scaling(results: Results) -> str:
    """The exponents of the newest run that had time for all sizes, or else of the newest."""
    complete = (run for run in results.files["run"].items() if {fit["varied"] for fit in run[1]["fits"]} >= {*VARIED})
    name, result = next(complete, None) or results.newest("run", "fits")
    fits, lines = result["fits"], []
    for kind, (baseline, *_, ours) in PROVIDERS.items():
        for provider in (baseline, ours):
            own = [find(fits, kind=kind, provider=provider.name, varied=varied) for varied in VARIED]
            lines.append((code(provider.name), *(f"{fit['exponent']:.2f}" if fit else "-" for fit in own)))
    head = ("", "tokens", "vocabulary", "features", "kept tokens of a batch")
    return f"{table(head, lines)}\n\n{where(result['header'])}: {link(name)}."


def training_step(results: Results) -> str:
    rows = results.newest("run", "training step")[1]["training step"]
    text = (
        f"{_model(rows[0])}, float32, forward and backward; peak memory above the model and its gradients. The logits "
        f"alone would be {size(4 * rows[0]['T'] * rows[0]['V'])}."
    )
    shares = sorted({row["ignored"] for row in rows})
    lines = []
    for way, name in (("plain", "transformers"), ("patched", "`patch_model(model)`")):
        own = [find(rows, way=way, ignored=share) for share in shares]
        lines.append((name, *(size(row["bytes"]) if row else "-" for row in own)))
    drawn = embedded("training-step", "Peak memory of a training step, plain and patched")
    return f"{text}\n\n{table(('', *(f'{share:.0%} ignored' for share in shares)), lines)}\n\n{drawn}"


def traffic(results: Results) -> str:
    rows = [row for row in results.newest("run", "traffic")[1]["traffic"] if row["ignored"] == 0.5]
    case, lines = rows[0]["case"], []
    for passes in ("forward", "backward"):
        row = find(rows, case=case, passes=f"ours, {passes}")
        assert row is not None
        moved = (row["kept"], row["of ignored"])
        lines.append((passes, *(f"{rows['read']:.3f} reads, {rows['written']:.3f} writes" for rows in moved)))
    return f"{case}, half of the rows ignored:\n\n{table(('', 'kept row', 'ignored row'), lines)}"


NO_PROOFS = "No committed result has them yet: `make proofs`."


def _compiled(name: str, found: Row) -> str:
    which = "shapes of models" if found["quick"] else "every tile size that a launch can choose"
    judged = (
        "No kernel spills registers to memory. On NVIDIA's targets, long aligned rows are read by wide loads, and the "
        "main kernels keep their budgets of instructions."
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


def compiled(results: Results) -> str:
    found = results.newest_proofs()
    return _compiled(*found) if found else NO_PROOFS


def proofs(results: Results) -> str:
    newest = results.newest_proofs()
    if newest is None:
        return NO_PROOFS
    name, found = newest
    rows = [row for row in found[picture.PREDICTIONS] if row["V"] == PREDICTED_V]
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    lines = []
    for chip in dict.fromkeys(row["chip"] for row in rows):
        own = [find(rows, chip=chip, kernel=kernel) for kernel in kernels]
        shares = [f"{row['share of the memory roof']:.2f}, {row['bound']}" if row else "-" for row in own]
        lines.append((chip, *shares))
    head = ("", *(kernel.replace("fused_ignore_ce ", "ours, ").replace("_kernel", ",") for kernel in kernels))
    text = f"{found['note']} Shares of the memory roof at V={PREDICTED_V}, and what bounds them:"
    drawn = embedded(PREDICTED, "A prediction, not a measurement: shares of the memory roof")
    return "\n\n".join([_compiled(name, found), text, table(head, lines), drawn])


def distributed(results: Results) -> str:
    file, found = results.newest("distributed", "rows")
    lines = []
    for name in dict.fromkeys(row["name"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["name"] == name]
        sent = [row["bytes_per_token"] for row in own]
        cells = [f"{n / 1024:.0f} KiB" if n >= 10240 else f"{n:.0f} B" for n in sent]
        lines.append((f"`{name}`", *cells, *(size(row["peak_bytes"]) for row in own)))
    ranks = [f"{ranks} ranks" for ranks in found["ranks"]]
    text = f"N={found['N']}, V={found['V']}, D={found['D']}, float32, {found['ignored']:.0%} ignored ({link(file)}):"
    return f"{text}\n\n{table(('', *(f'sent, {n}' for n in ranks), *(f'held, {n}' for n in ranks)), lines)}"


def ignored(results: Results) -> str:
    return embedded("ignored", "Time and peak memory of the losses against the share of ignored tokens")


def growth(results: Results) -> str:
    return (
        f"{embedded('tokens', 'Time and peak memory of the losses against the number of tokens')}\n"
        f"{embedded('bandwidth', 'Bandwidth of the loss of logits against the vocabulary')}"
    )


def compared(results: Results) -> str:
    """The README's table."""
    return comparison.short(results.newest("comparison", "cells")[1])


def comparisons(results: Results) -> str:
    """Every row, with its reasons."""
    return comparison.long(*results.newest("comparison", "cells"))


def memory(results: Results) -> str:
    """Memory by formulas, which tests check against measured peaks. No result enters."""
    N, V, D = 8192, 128256, 4096
    whole, half = linear_cost(N, V, D), linear_cost(N, V, D, memory_budget=2**29)
    chunks = 2 * 1024 * V + 4 * V * D
    lines = [
        (
            "`F.cross_entropy(F.linear(h, w).float(), y)`",
            "log-softmax and two gradients in float32, before there are others: `3 x 4NV - s(N + V)D`",
            f"{whole.plain_bytes / 2**30:.1f} GiB",
        ),
        (whole.plan.plan, "`sNV`", f"{whole.plan.bytes / 2**30:.1f} GiB"),
        (
            "token chunks of c rows",
            "`scV + 4VD` (nothing for `4VD` where the head's gradient is float32 or not wanted)",
            f"{chunks / 2**30:.1f} GiB, c=1024",
        ),
        (
            f"{half.plan.plan} of b classes", "`sNb + 4ND + 48 NV/b`",
            f"{half.plan.bytes / 2**30:.2f} GiB, b={half.plan.chunk}",
        ),
    ]  # fmt: skip
    return table(("", "held at the peak", f"N={N}, V={V}, D={D}, bf16"), lines)


FUNCTIONS = (
    machine, headline, coverage, ignored, logits, linear, models, scaling, growth, training_step, traffic, compiled,
    proofs, memory, distributed, compared, comparisons,
)  # fmt: skip
BLOCKS: dict[str, Callable[[Results], str]] = {f.__name__.replace("_", "-"): f for f in FUNCTIONS}


def rewritten(page: Path, text: str, results: Results) -> str:
    """A page's text with every block generated anew."""

    def block(found: re.Match[str]) -> str:
        new = BLOCKS[found[2]](results)
        if page.parent.name == "docs":
            new = new.replace("](docs/", "](").replace("](bench/", "](../bench/")
        return f"{found[1]}{new}\n{found[3]}"

    return BLOCK.sub(block, text)


def shown(results: Results) -> dict[str, tuple[Any, str]]:
    """What each picture shows, and the newest run that has its figures, by the picture's name."""
    found: dict[str, tuple[Any, str]] = {}
    for result in results.files["run"].values():
        found = {name: (data, heading(result["header"])) for name, data in plots.pictures(result).items()} | found
    newest = results.newest_proofs()
    if newest:
        found[PREDICTED] = picture.rows(newest[1]), f"commit {newest[1]['header']['commit'][:7]}"
    return found


def draw(results: Results, folder: Path = PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, about) in shown(results).items():
        if name == PREDICTED:
            picture.draw({picture.PREDICTIONS: data}, about, folder / f"{name}.png")
        else:
            plots.draw(name, data, about, folder)


if __name__ == "__main__":
    found = Results()
    draw(found)
    for page in PAGES:
        page.write_text(rewritten(page, page.read_text(), found))
