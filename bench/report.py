"""A result as Markdown: every figure with what it was measured on, and everything that has none with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .providers import PROVIDERS

Row = dict[str, Any]

UNITS = {"logits": "GB/s", "linear": "TFLOP/s"}
TITLES = {"logits": "Loss of logits", "linear": "Linear loss"}
ROOFS = {"logits": "a copy of the logits", "linear": "the kept tokens' matrix products"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; a cell may hold a `|`, as expressions do."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:.0f} MiB"


def code(name: str) -> str:
    """A loss's name: an expression is set as code."""
    return f"`{name}`" if "(" in name else name


def conditions(header: Row) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    cores = (
        f"{header['cores']} cores, {header['threads']} threads, {header['simd']}; " if header["kind"] == "cpu" else ""
    )
    return f"{header['device']}; {cores}{header['system']}, Python {header['python']}, {versions}"


def markdown(result: Row) -> str:
    """The whole file."""
    header = result["header"]
    commit = f"{header['commit']}{', with changes that are not committed' if header['dirty'] else ''}"
    parts = [
        f"# {header['device']}, {header['date']}",
        f"`{header['command']}`, {header['seconds']} s; commit {commit}.",
        f"{conditions(header)}. Load average at the start: {header['load']}.",
        f"Shapes: {header['tokens']}.",
        _plots(result),
        *(_speed(result, kind) for kind in PROVIDERS),
        _gates(result),
        _fits(result),
        _ahead(result),
        _training_step(result),
        _traffic(result),
        _aot(result),
        _list("Left out, the time was up", result["left out"]),
        _list("Failed", result["failed"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plots(result: Row) -> str:
    return "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in result.get("plots", ()))


def memory_of(result: Row, row: Row) -> str:
    """Where it was measured, of the same loss at the same sizes."""
    keys = ("kind", "N", "V", "D", "ignored", "dtype", "direction", "provider")
    found = [m["bytes"] for m in result["memory"] if all(m[key] == row[key] for key in keys)]
    return size(found[0]) if found else ""


def _speed(result: Row, kind: str) -> str:
    rows = [row for row in result["rows"] if row["kind"] == kind]
    if not rows:
        return ""
    lines = [
        (
            f"{row['shape']}, N={row['N']} V={row['V']}" + f" D={row['D']}" * (row["D"] > 0), row["dtype"],
            f"{row['ignored']:.0%}", row["direction"], code(row["provider"]),
            *(f"{row['ms'][p]:.2f}" for p in ("p50", "p20", "p80")), f"{row['rate']:.3g}",
            f"{row['share_of_roof']:.0%}" if "roof" in row else "",
            f"{row['ratio']:.2f}" if "ratio" in row else "", memory_of(result, row), str(row["rounds"]),
        )
        for row in rows
    ]  # fmt: skip
    head = (
        "shape", "dtype", "ignored", "direction", "loss", "ms, p50", "p20", "p80", UNITS[kind], "of roof",
        "ratio to the first", "peak memory", "rounds",
    )  # fmt: skip
    note = (
        f"{UNITS[kind]}: the least work of the case over the median time; roof: {ROOFS[kind]}, in the same rounds. "
        "Ratio: of medians, to the first loss, which took turns. Peak memory: forward and backward, beside operands "
        "and gradients."
    )
    if kind == "linear":
        note += " Losses that compute gradients in forward have that work there, and next to none in backward."
    if any(row["provider"] == "Liger" for row in rows) and kind == "logits":
        note += " Liger overwrites the logits: they are restored outside of the time, and its gradient needs no memory."
    return f"## {TITLES[kind]}\n\n{note}\n\n{table(head, lines)}"


def _gates(result: Row) -> str:
    rows = [
        (TITLES[g["kind"]], code(g["provider"]), g["dtype"], g["status"], g["reason"])
        for g in result["gates"]
    ]  # fmt: skip
    text = "Loss and gradients against float64, then a probe of its cost; only what is green is timed."
    return f"## Gates\n\n{text}\n\n{table(('', 'loss', 'dtype', 'gate', 'reason'), rows)}" if rows else ""


def _fits(result: Row) -> str:
    rows = [
        (TITLES[f["kind"]], code(f["provider"]), f["varied"], f"{f['from']} to {f['to']}", str(f["points"]),
         f"{f['exponent']:.2f}")
        for f in result["fits"]
    ]  # fmt: skip
    text = (
        "k in time = c x^k, by least squares of the logarithms; bfloat16, forward and backward, the other sizes fixed."
    )
    return f"## Scaling\n\n{text}\n\n{table(('', 'loss', 'x', 'range', 'points', 'k'), rows)}" if rows else ""


def _ahead(result: Row) -> str:
    rows = [
        (TITLES[a["kind"]], f"{a['model']}, N={a['N']}", f"{a['ignored']:.0%}", size(a["plain bytes"]),
         size(a["bytes"]) + f", {a['plan']}" if "bytes" in a else "one block",
         f"{a['plain seconds']:.3g} s" if "plain seconds" in a else "", f"{a['seconds']:.3g} s")
        for a in result["plan ahead"]
    ]  # fmt: skip
    text = (
        "**Arithmetic, not measured**: memory by formula; time from this run's rates, of the matrix products alone for "
        "the linear loss, of our loss at the base shape for logits."
    )
    head = ("", "shape", "ignored", "plain, memory", "ours, memory", "plain, at least", "ours, at least")
    return f"## Ahead\n\n{text}\n\n{table(head, rows)}" if rows else ""


def _training_step(result: Row) -> str:
    rows = [(r["way"], f"{r['ignored']:.0%}", size(r["bytes"])) for r in result["training step"]]
    if not rows:
        return ""
    r = result["training step"][0]
    text = (
        f"Peak memory of forward and backward above model and gradients: a Llama of {r['layers']} layers, {r['T']} "
        f"tokens, V={r['V']}, D={r['D']}, float32, on the CPU. Its logits are {size(4 * r['T'] * r['V'])}."
    )
    return f"## Training step\n\n{text}\n\n{table(('model', 'ignored', 'peak'), rows)}"


def _traffic(result: Row) -> str:
    rows = []
    for r in result["traffic"]:
        if "failed" in r:
            cells = ["not measured", r["failed"], *[""] * 4]
        else:
            worst = [r[which][what] for which in ("kept", "of ignored") for what in ("read", "written")]
            cells = ["-" if w is None else f"{w:.3f}" for w in worst] + [f"{r['bytes']}", f"{r['fewest']}"]
        rows.append((r["case"], f"{r['ignored']:.0%}", r["passes"], *cells))
    text = "Counted in Triton's interpreter, in units of a row; see `bench.traffic`."
    head = ("case", "ignored", "passes", "kept: read", "written", "ignored: read", "written", "bytes", "fewest")
    return f"## Bytes that the kernels move\n\n{text}\n\n{table(head, rows)}" if rows else ""


def _aot(result: Row) -> str:
    aot = result["aot"]
    if not aot:
        return ""
    text = (
        f"{aot['kernels']} kernels for {', '.join(f'sm_{arch}' for arch in aot['archs'])} in {', '.join(aot['dtypes'])}"
        f"{' (the widest tiles, few features)' if aot['quick'] else ''}: {aot['spilling']} spill, at most "
        f"{aot['most registers']} registers, {len(aot['faults'])} with faults."
    )
    return "## Compiled ahead of time\n\n" + "\n".join([text, *(f"- {fault}" for fault in aot["faults"])])


def _list(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def summary(result: Row) -> str:
    """For the terminal: the base shape, forward and backward."""
    lines = []
    for row in result["rows"]:
        if row["shape"] == "base" and row["direction"] == "both" and "ratio" in row:
            of = f"{row['kind']:7}{row['dtype']:9}{row['ignored']:4.0%} ignored  {row['provider']:45}"
            lines.append(f"{of}{row['ms']['p50']:10.2f} ms {row['ratio']:6.2f} of the first")
    counts = f"{len(result['rows'])} figures, {len(result['left out'])} left out, {len(result['failed'])} failed"
    red = [f"RED {g['provider']}, {g['dtype']}: {g['reason']}" for g in result["gates"] if g["status"] == "red"]
    return "\n".join([*lines, *red, *result["failed"], counts])
