"""The README's figures, taken from committed result files: `python -m bench.figures` writes them between its markers.

A block is `<!-- figures: NAME -->`, what is generated, `<!-- end -->`. NAME is a function's below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_ignore_ce.cost import linear_cost

from .machine import ROOT
from .providers import PROVIDERS
from .report import code, memory_of, size, table
from .scaling import VARIED
from .workload import MODELS

Row = dict[str, Any]

MODEL_NAMES = {model.name for model in MODELS}
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Results:
    """Result files of full runs, the newest first, by their names; those of `bench.distributed` apart."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.distributed = sorted(folder.glob("distributed-*.json"))
        paths = [p for p in folder.glob("*.json") if not p.stem.endswith("-quick") and p not in self.distributed]
        read = {path.stem: json.loads(path.read_text()) for path in paths}
        self.files = dict(sorted(read.items(), key=lambda item: item[1]["header"]["date"], reverse=True))

    def newest(self, section: str) -> tuple[str, Row]:
        """Of those that have the section, by name."""
        for name, result in self.files.items():
            if result[section]:
                return name, result
        raise SystemExit(f"no result in bench/results has {section}: python -m bench.run")


def machine(results: Results) -> str:
    name, result = results.newest("rows")
    header = result["header"]
    cores = f"{header['cores']} cores of an {header['device']}" if header["kind"] == "cpu" else header["device"]
    versions = header["versions"]
    return (
        f"All of it by `{header['command']}` on one machine: {cores} ({header['simd']}), PyTorch {versions['torch']}, "
        f"commit {header['commit'][:7]}, {header['date']}; every figure with its spread, the machine's own roof and "
        f"what was left out: [{name}](bench/results/{name}.md)."
    )


def _find(rows: list[Row], **values: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)


def _ratio(row: Row | None) -> str:
    return f"{row['ratio']:.2f}" if row and "ratio" in row else "-"


def _base(result: Row, kind: str, columns: list[tuple[str, float]], memory: tuple[str, float]) -> str:
    """Ratios at the base shape, by (dtype, ignored), and memory in one of them."""
    rows = [row for row in result["rows"] if row["shape"] == "base" and row["direction"] == "both"]
    lines = []
    for provider in PROVIDERS[kind]:
        own = [_find(rows, kind=kind, provider=provider.name, dtype=d, ignored=i) for d, i in columns]
        if not any(own):
            continue
        held = _find(rows, kind=kind, provider=provider.name, dtype=memory[0], ignored=memory[1])
        peak = held and memory_of(result, held)
        lines.append((code(provider.name), *map(_ratio, own), peak or "-"))
    dtypes = {dtype for dtype, _ in columns}
    names = [f"{dtype} " * (len(dtypes) > 1) + f"{ignored:.0%} ignored" for dtype, ignored in columns]
    return table(("", *names, f"peak memory, {memory[0]}, {memory[1]:.0%}"), lines)


def _sizes(result: Row, kind: str) -> str:
    row = _find(result["rows"], kind=kind, shape="base")
    assert row is not None
    return f"N={row['N']}, V={row['V']}" + f", D={row['D']}" * (row["D"] > 0)


def logits(results: Results) -> str:
    _, result = results.newest("rows")
    columns = [("bfloat16", share) for share in (0.0, 0.5, 0.75, 0.95)]
    text = f"{_sizes(result, 'logits')}, bfloat16, ratios of medians to the first:"
    return f"{text}\n\n{_base(result, 'logits', columns, ('bfloat16', 0.0))}"


def linear(results: Results) -> str:
    _, result = results.newest("rows")
    columns = [(dtype, share) for dtype in ("bfloat16", "float32") for share in (0.0, 0.75)]
    text = f"{_sizes(result, 'linear')}, ratios of medians to the first:"
    slow = [gate for gate in result["gates"] if gate["status"] == "slow"]
    notes = "".join(f"\n\n{code(g['provider'])} in {g['dtype']} was not measured: {g['reason']}." for g in slow)
    return f"{text}\n\n{_base(result, 'linear', columns, ('bfloat16', 0.0))}{notes}"


def models(results: Results) -> str:
    """Ours at real sizes."""
    rows = [row for row in results.newest("rows")[1]["rows"] if row["direction"] == "both"]
    lines = []
    for model in MODELS:
        cells, tokens = [], []
        for kind, providers in PROVIDERS.items():
            own = [r for r in rows if (r["kind"], r["V"], r["provider"]) == (kind, model.V, providers[-1].name)]
            own = [r for r in own if r["D"] in (0, model.D) and r["shape"] in MODEL_NAMES]
            found = [_find(own, ignored=share) for share in (0.0, 0.75)]
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
            lines.append((code(provider.name), *(f"{fit['exponent']:.2f}" if fit else "-" for fit in own)))
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


def aot(results: Results) -> str:
    """Of the newest run that compiled all of them; failing that, of the newest that compiled some."""
    whole = ((name, result) for name, result in results.files.items() if result["aot"] and not result["aot"]["quick"])
    name, result = next(whole, None) or results.newest("aot")
    found = result["aot"]
    which = "the widest tiles, few features" if found["quick"] else "every tile that a launch can choose"
    return (
        f"{found['kernels']} kernels ({which}), for {', '.join(f'sm_{arch}' for arch in found['archs'])} in "
        f"{', '.join(found['dtypes'])}: {found['spilling'] or 'none'} with spills, {len(found['faults']) or 'none'} "
        f"with accesses to logits narrower than they could be ([{name}](bench/results/{name}.md))."
    )


def distributed(results: Results) -> str:
    """The newest result of `bench.distributed`."""
    if not results.distributed:
        raise SystemExit(f"no results in {RESULTS}: python -m bench.distributed")
    path = results.distributed[-1]
    found = json.loads(path.read_text())
    lines = []
    for name in dict.fromkeys(row["name"] for row in found["rows"]):
        own = [_find(found["rows"], name=name, ranks=ranks) for ranks in found["ranks"]]
        sent = [row["bytes_per_token"] for row in own if row]
        cells = [f"{n / 1024:.0f} KiB" if n >= 10240 else f"{n:.0f} B" for n in sent]
        lines.append((f"`{name}`", *cells, *(size(row["peak_bytes"]) for row in own if row)))
    ranks = [f"{ranks} ranks" for ranks in found["ranks"]]
    text = (
        f"N={found['N']}, V={found['V']}, D={found['D']}, float32, {found['ignored']:.0%} ignored "
        f"([{path.stem}](bench/results/{path.name})):"
    )
    head = ("", *(f"sent, {each}" for each in ranks), *(f"held, {each}" for each in ranks))
    return f"{text}\n\n{table(head, lines)}"


def plots(results: Results) -> str:
    pictures = results.newest("plots")[1]["plots"]
    return "\n".join(f"![{name.removesuffix('.png')}](bench/results/{name})" for name in pictures)


def memory(results: Results) -> str:
    """By formula, which tests check against measured peaks; no result enters."""
    N, V, D = 8192, 128256, 4096
    whole, half = linear_cost(N, V, D), linear_cost(N, V, D, memory_budget=2**29)
    chunks = 2 * 1024 * V + 4 * V * D
    return table(
        ("", "held at the peak", f"N={N}, V={V}, D={D}, bf16"),
        [
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
                f"{half.plan.plan} of b classes",
                "`sNb + 4ND + 48 NV/b`",
                f"{half.plan.bytes / 2**30:.2f} GiB, b={half.plan.chunk}",
            ),
        ],
    )


BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": machine, "logits": logits, "linear": linear, "models": models, "scaling": scaling,
    "training-step": training_step, "traffic": traffic, "aot": aot, "plots": plots, "memory": memory,
    "distributed": distributed,
}  # fmt: skip


def rewritten(text: str, results: Results) -> str:
    """The text with every block generated anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](results)}\n{found[3]}", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(), Results()))
