"""Writes the README's figures, which are taken from committed result files: `python -m bench.figures`.

In the README, a generated block stands between `<!-- figures: NAME -->` and `<!-- end -->`. NAME is the name of one of
the functions below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fused_ignore_ce.cost import linear_cost

from .machine import ROOT
from .speed.providers import PROVIDERS
from .speed.scaling import VARIED
from .speed.workload import MODELS

Row = dict[str, Any]

RESULTS = ROOT / "bench" / "results"
#: Beginnings of the names of result files of `bench.tune` and `bench.gpu`.
NO_RUNS = ("tune-", "gpu-")

#: The vocabulary at which the README has predictions.
PREDICTED_V = 128256

BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Results:
    """The result files of full runs by name, the newest first, and apart from them those of `bench.distributed`."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.distributed = sorted(folder.glob("distributed-*.json"))
        others = ("distributed-", *NO_RUNS)
        paths = [p for p in folder.glob("*.json") if not p.stem.endswith("-quick") and not p.stem.startswith(others)]
        read = {path.stem: json.loads(path.read_text()) for path in paths}
        self.files = dict(sorted(read.items(), key=lambda item: item[1]["header"]["date"], reverse=True))

    def newest(self, section: str) -> tuple[str, Row]:
        """Name and content of the newest result in which a section is not empty."""
        for name, result in self.files.items():
            if result[section]:
                return name, result
        raise SystemExit(f"no result in bench/results has {section}: python -m bench.run")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:.0f} MiB"


def _code(name: str) -> str:
    """A loss's name, set as code where it is an expression."""
    return f"`{name}`" if "(" in name else name


def _find(rows: list[Row], **values: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)


def _ratio(row: Row | None) -> str:
    return f"{row['ratio']:.2f}" if row and "ratio" in row else "-"


def _peak(result: Row, row: Row | None) -> str:
    """The peak memory that was measured for the loss and the sizes of a row."""
    keys = ("kind", "N", "V", "D", "ignored", "dtype", "direction", "provider")
    held = row and _find(result["memory"], **{key: row[key] for key in keys})
    return size(held["bytes"]) if held else "-"


def machine(results: Results) -> str:
    name, result = results.newest("rows")
    header = result["header"]
    cores = f"{header['cores']} cores of an {header['device']}" if header["kind"] == "cpu" else header["device"]
    return (
        f"All of it by `{header['command']}` on one machine: {cores} ({header['simd']}), PyTorch "
        f"{header['versions']['torch']}, commit {header['commit'][:7]}, {header['date']}; every figure with its "
        f"spread, the machine's own roof and what was left out: [{name}](bench/results/{name}.json)."
    )


def _base(result: Row, kind: str, columns: list[tuple[str, float]]) -> str:
    """Ratios at the base shape by (dtype, ignored), and peak memory in the first of these columns."""
    rows = [r for r in result["rows"] if (r["kind"], r["shape"], r["direction"]) == (kind, "base", "both")]
    sizes = f"N={rows[0]['N']}, V={rows[0]['V']}" + (f", D={rows[0]['D']}" if rows[0]["D"] else "")
    lines = []
    for provider in PROVIDERS[kind]:
        own = [_find(rows, provider=provider.name, dtype=dtype, ignored=ignored) for dtype, ignored in columns]
        if any(own):
            lines.append((_code(provider.name), *map(_ratio, own), _peak(result, own[0])))
    dtype, *others = sorted({dtype for dtype, _ in columns})
    names = [f"{dtype} {ignored:.0%} ignored" if others else f"{ignored:.0%} ignored" for dtype, ignored in columns]
    text = f"{sizes}, {'' if others else f'{dtype}, '}ratios of medians to the first:"
    return f"{text}\n\n{table(('', *names, f'peak memory, {columns[0][0]}, {columns[0][1]:.0%}'), lines)}"


def logits(results: Results) -> str:
    return _base(results.newest("rows")[1], "logits", [("bfloat16", share) for share in (0.0, 0.5, 0.75, 0.95)])


def linear(results: Results) -> str:
    _, result = results.newest("rows")
    slow = [gate for gate in result["gates"] if gate["status"] == "slow"]
    notes = "".join(f"\n\n{_code(g['provider'])} in {g['dtype']} was not measured: {g['reason']}." for g in slow)
    columns = [(dtype, share) for dtype in ("bfloat16", "float32") for share in (0.0, 0.75)]
    return _base(result, "linear", columns) + notes


def models(results: Results) -> str:
    """Ratios of this package's losses at the sizes of models. Models of one vocabulary share their logits' figures."""
    names = {model.name for model in MODELS}
    rows = [r for r in results.newest("rows")[1]["rows"] if r["direction"] == "both" and r["shape"] in names]
    lines = []
    for model in MODELS:
        cells: list[str] = []
        tokens: list[str] = []
        for (kind, providers), D in zip(PROVIDERS.items(), (0, model.D), strict=True):
            own = {"kind": kind, "V": model.V, "D": D, "provider": providers[-1].name}
            found = [_find(rows, **own, ignored=share) for share in (0.0, 0.75)]
            cells += map(_ratio, found)
            tokens.append(str(found[0]["N"]) if found[0] else "-")
        lines.append((f"{model.name}, {model.V} x {model.D}", " / ".join(tokens), *cells))
    head = ("", "tokens, logits / linear", "logits, 0% ignored", "75%", "linear, 0% ignored", "75%")
    return table(head, lines)


def scaling(results: Results) -> str:
    fits = results.newest("fits")[1]["fits"]
    lines = []
    for kind, (baseline, *_, ours) in PROVIDERS.items():
        for provider in (baseline, ours):
            own = [_find(fits, kind=kind, provider=provider.name, varied=varied) for varied in VARIED]
            lines.append((_code(provider.name), *(f"{fit['exponent']:.2f}" if fit else "-" for fit in own)))
    return table(("", "tokens", "vocabulary", "features", "kept tokens of a batch"), lines)


def training_step(results: Results) -> str:
    rows = results.newest("training step")[1]["training step"]
    r = rows[0]
    text = (
        f"a Llama of {r['layers']} layers, {r['T']} tokens, V={r['V']}, D={r['D']}, float32, forward and backward; "
        f"peak memory above the model and its gradients. The logits alone would be {size(4 * r['T'] * r['V'])}."
    )
    shares = sorted({row["ignored"] for row in rows})
    lines = []
    for way, name in (("plain", "transformers"), ("patched", "`patch_model(model)`")):
        own = [_find(rows, way=way, ignored=share) for share in shares]
        lines.append((name, *(size(row["bytes"]) if row else "-" for row in own)))
    return f"{text}\n\n{table(('', *(f'{share:.0%} ignored' for share in shares)), lines)}"


def traffic(results: Results) -> str:
    rows = [row for row in results.newest("traffic")[1]["traffic"] if row["ignored"] == 0.5]
    case, lines = rows[0]["case"], []
    for passes in ("forward", "backward"):
        row = _find(rows, case=case, passes=f"ours, {passes}")
        assert row is not None
        moved = (row["kept"], row["of ignored"])
        lines.append((passes, *(f"{rows['read']:.3f} reads, {rows['written']:.3f} writes" for rows in moved)))
    return f"{case}, half of the rows ignored:\n\n{table(('', 'kept row', 'ignored row'), lines)}"


def proofs(results: Results) -> str:
    """The newest run that compiled all kernels; where there is none, the newest that compiled some."""
    runs = [(name, result["proofs"]) for name, result in results.files.items() if result.get("proofs")]
    if not runs:
        return "No committed result has them yet: `make bench`."
    name, found = next((run for run in runs if not run[1]["quick"]), runs[0])
    which = "shapes of models" if found["quick"] else "every tile that a launch can choose"
    text = (
        f"{found['kernels']} kernels ({which}), for {', '.join(found['targets'])} in {', '.join(found['dtypes'])}: "
        f"{found['spilling'] or 'none'} with spills, {found['narrow'] or 'none'} with accesses to logits narrower than "
        f"they could be, {len(found['faults']) or 'no'} faults in all ([{name}](bench/results/{name}.json))."
    )
    rows = [row for row in found["predictions, not measurements"] if row["V"] == PREDICTED_V]
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    lines = []
    for chip in dict.fromkeys(row["chip"] for row in rows):
        own = [_find(rows, chip=chip, kernel=kernel) for kernel in kernels]
        shares = [f"{row['share of the memory roof']:.2f}, {row['bound']}" if row else "-" for row in own]
        lines.append((chip, *shares))
    head = ("", *(kernel.replace("fused_ignore_ce ", "ours, ").replace("_kernel", ",") for kernel in kernels))
    return f"{text}\n\n{found['note']} Shares of the memory roof at V={PREDICTED_V}, and what bounds them:\n\n" + table(
        head, lines
    )


def distributed(results: Results) -> str:
    if not results.distributed:
        raise SystemExit(f"no results in {RESULTS}: python -m bench.distributed")
    path = results.distributed[-1]
    found = json.loads(path.read_text())
    lines = []
    for name in dict.fromkeys(row["name"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["name"] == name]
        sent = [row["bytes_per_token"] for row in own]
        cells = [f"{n / 1024:.0f} KiB" if n >= 10240 else f"{n:.0f} B" for n in sent]
        lines.append((f"`{name}`", *cells, *(size(row["peak_bytes"]) for row in own)))
    ranks = [f"{ranks} ranks" for ranks in found["ranks"]]
    text = (
        f"N={found['N']}, V={found['V']}, D={found['D']}, float32, {found['ignored']:.0%} ignored "
        f"([{path.stem}](bench/results/{path.name})):"
    )
    return f"{text}\n\n{table(('', *(f'sent, {n}' for n in ranks), *(f'held, {n}' for n in ranks)), lines)}"


def plots(results: Results) -> str:
    pictures = results.newest("plots")[1]["plots"]
    return "\n".join(f"![{name.removesuffix('.png')}](bench/results/{name})" for name in pictures)


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


BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": machine, "logits": logits, "linear": linear, "models": models, "scaling": scaling,
    "training-step": training_step, "traffic": traffic, "proofs": proofs, "plots": plots, "memory": memory,
    "distributed": distributed,
}  # fmt: skip


def rewritten(text: str, results: Results) -> str:
    """The text with every block generated anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](results)}\n{found[3]}", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(), Results()))
