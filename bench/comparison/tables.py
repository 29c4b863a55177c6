"""The comparison as Markdown, written from a result of `python -m bench.comparison`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from bench.packages import PACKAGES

from .rows import ALL, Row

Result = dict[str, Any]

TITLES = {
    "logits": "The loss of logits",
    "linear": "The loss from hidden states",
    "models": "Patched transformers models",
    "package": "The package as a whole",
}

LABELS = {
    "logits": {
        "fused_ignore_ce": "`fused_cross_entropy`", "PyTorch": "`F.cross_entropy`", "Liger": "`liger_cross_entropy`",
        "QuACK": "`cross_entropy`",
    },
    "linear": {
        "fused_ignore_ce": "`fused_linear_cross_entropy`", "PyTorch": "`F.linear_cross_entropy(options=...)`",
        "Liger": "`liger_fused_linear_cross_entropy`", "TRL": "`ChunkedLogProbFunction`, as its trainers call it",
        "CCE": "`linear_cross_entropy`", "QuACK": "`chunked_linear_cross_entropy`",
    },
    "models": {
        "fused_ignore_ce": "`patch_model`", "Liger": "`apply_liger_kernel_to_...`, its loss alone", "CCE": "`cce_patch`"
    },
    "package": {},
}  # fmt: skip

MARK = "†"


def cell(result: Result, row: Row, kind: str, package: str) -> dict[str, str] | None:
    keys = {"question": row.question, "kind": kind, "package": package}
    return next((cell for cell in result["cells"] if keys.items() <= cell.items()), None)


def _text(found: dict[str, str] | None) -> str:
    if found is None:
        return "-"
    return found["answer"] + (f" {MARK}" if found["basis"] == "stated" else "")


def _table(result: Result, rows: Sequence[tuple[Row, str]], packages: Sequence[str]) -> str:
    lines = [(row.question, *(_text(cell(result, row, kind, package)) for package in packages)) for row, kind in rows]
    return tabulate(lines, ("", *map(_head, packages)), tablefmt="github", disable_numparse=True)


def _head(package: str) -> str:
    return "this package" if package == "fused_ignore_ce" else package


def versions(result: Result) -> str:
    found = result["header"]["versions"]
    checked = [f"{package} {found[name]}" for package, name in PACKAGES.items() if found.get(name)]
    stated = [f"{name} {result['sources'][name][0]}" for name in ("CCE", "QuACK")]
    return (
        f"Checked by code on a CPU, {result['header']['date']}: {', '.join(checked)}; with transformers "
        f"{found['transformers']}; Triton kernels in Triton's interpreter. {MARK} From documentation or "
        f"source, not run: {', '.join(stated)}, and every {MARK} of the others. -: not offered, or not stated."
    )


def short(result: Result) -> str:
    """The rows that the README shows."""
    rows = [(row, row.short) for row in ALL if row.short]
    torch = "PyTorch is `F.cross_entropy` in the row about logits, else `F.linear_cross_entropy` with `options`."
    return f"{_table(result, rows, list(PACKAGES))}\n\n{versions(result)} {torch}"


def long(name: str, result: Result) -> str:
    """Every row, with the reason for every no and for every answer that was not checked."""
    parts = [f"{versions(result)} The result file is [{name}](bench/results/{name}.json)."]
    for kind, title in TITLES.items():
        rows = [(row, kind) for row in ALL if kind in row.kinds]
        packages = [p for p in PACKAGES if any(cell(result, row, kind, p) for row, kind in rows)]
        labels = [f"{_head(p)}: {LABELS[kind][p]}" for p in packages if p in LABELS[kind]]
        reasons = [_reasons(result, row, kind, packages) for row, kind in rows]
        parts += [f"## {title}", *(["; ".join(labels) + "."] if labels else []), _table(result, rows, packages)]
        parts += ["What was found, or is said:", "\n".join(filter(None, reasons))]
    links = [f"[{package} {version}]({link})" for package, (version, link) in result["sources"].items()]
    return "\n\n".join([*parts, f"Documentation and source: {', '.join(links)}."])


def _reasons(result: Result, row: Row, kind: str, packages: Sequence[str]) -> str:
    found = {package: cell(result, row, kind, package) for package in packages}
    told = [f"{_head(package)}: {_why(answer)}" for package, answer in found.items() if answer and answer["why"]]
    return f"- **{row.question}.** {' · '.join(told)}." if told else ""


def _why(found: dict[str, str]) -> str:
    """The reason for an answer. What a check found, an error or a value, is set as code."""
    return found["why"] if found["basis"] == "stated" else f"`{found['why'].rstrip('.')}`"
