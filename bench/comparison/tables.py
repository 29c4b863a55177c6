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
        "fused_ignore_ce":
            "`fused_linear_cross_entropy`, `fused_linear_log_probs` (entropy), `fused_linear_distillation_loss`",
        "PyTorch": "`F.linear_cross_entropy(options=...)`",
        "Liger":
            "`liger_fused_linear_cross_entropy`, `LigerFusedLinearScaledCrossEntropyFunction` (entropy), "
            "`liger_fused_linear_jsd` (with hard labels, that of `chunked_loss`)",
        "TRL": "`ChunkedLogProbFunction` and `ChunkedDivergenceFunction`, as its trainers call them on a GPU",
        "CCE": "`linear_cross_entropy`", "QuACK": "`chunked_linear_cross_entropy`",
    },
    "models": {
        "fused_ignore_ce": "`patch_model`", "Liger": "`apply_liger_kernel_to_...`, its loss alone", "CCE": "`cce_patch`"
    },
    "package": {},
}  # fmt: skip

MARK = "†"


def cell(result: Result, row: Row, kind: str, package: str, torch: str | None = None) -> dict[str, str] | None:
    """What was found, with the release of PyTorch that all packages were run with or with another one."""
    keys = {"question": row.question, "kind": kind, "package": package}
    asked = [found for found in result["other torch"] if found["torch"].partition("+")[0] == torch]
    cells: list[dict[str, str]] = (asked or [result])[0]["cells"]
    return next((cell for cell in cells if keys.items() <= cell.items()), None)


def releases(result: Result) -> list[str]:
    """The releases of PyTorch that were asked."""
    every = [result["header"]["versions"], *result["other torch"]]
    return [found["torch"].partition("+")[0] for found in every]


def _cells(result: Result, row: Row, kind: str, package: str) -> dict[str, dict[str, str]]:
    """The cells of a package by its version."""
    asked = releases(result) if package == "PyTorch" and row.check and package not in row.stated[kind] else [""]
    found = {version: cell(result, row, kind, package, version) for version in asked}
    return {version: answer for version, answer in found.items() if answer}


def _text(found: dict[str, dict[str, str]]) -> str:
    texts = [answer["answer"] + (f" {MARK}" if answer["basis"] == "stated" else "") for answer in found.values()]
    return " / ".join(texts if len(set(texts)) > 1 else texts[:1]) or "-"


def _table(result: Result, rows: Sequence[tuple[Row, str]], packages: Sequence[str]) -> str:
    lines = [(row.question, *(_text(_cells(result, row, kind, name)) for name in packages)) for row, kind in rows]
    heads = (_head(package, result) for package in packages)
    return tabulate(lines, ("", *heads), tablefmt="github", disable_numparse=True)


def _head(package: str, result: Result | None = None) -> str:
    """A package's name, with its version if a result is given."""
    if package == "fused_ignore_ce":
        return "this package"
    if result is None:
        return package
    own = " / ".join(releases(result)) if package == "PyTorch" else result["sources"][package][0]
    return f"{package} {own}"


def versions(result: Result) -> str:
    header = result["header"]
    transformers = header["versions"]["transformers"]
    return (
        f"Checked by code on a CPU, {header['date']}, with this package at commit {header['commit'][:7]} and "
        f"transformers {transformers}. Triton kernels ran in Triton's interpreter. Where releases of "
        f"PyTorch differ, a slash separates their answers; all other packages ran with PyTorch {releases(result)[0]}. "
        "CCE's code is that of its repository, which is newer than its release; its implementation in PyTorch was run. "
        f"An answer with {MARK} was read in documentation or source and not run, as all of QuACK's were. A dash means: "
        "not offered, or not stated."
    )


def short(result: Result) -> str:
    """The rows that the README shows."""
    rows = [(row, row.short) for row in ALL if row.short]
    torch = (
        "PyTorch stands for `F.cross_entropy` in the row about overwritten logits, and for `F.linear_cross_entropy` "
        "with `options` in all others."
    )
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
    told = []
    for package in packages:
        found = {version: _why(answer) for version, answer in _cells(result, row, kind, package).items()}
        same = len(set(found.values())) == 1
        whys = found.items() if not same else [("", next(iter(found.values())))]
        told += [f"{' '.join(filter(None, [_head(package), version]))}: {why}" for version, why in whys if why]
    return f"- **{row.question}.** {' · '.join(told)}." if told else ""


def _why(found: dict[str, str]) -> str:
    """The reason for an answer. What a check found, an error or a value, is set as code."""
    if found["basis"] == "stated" or "`" in found["why"]:
        return found["why"]
    return f"`{found['why'].rstrip('.')}`" if found["why"] else ""
