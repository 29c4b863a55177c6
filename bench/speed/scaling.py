"""How cost grows: exponents fitted to a run's figures, and arithmetic for shapes that the machine has no room for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch

from fused_ignore_ce.cost import linear_cost, plain_logits_bytes

from .providers import PROVIDERS
from .workload import MODELS

Row = dict[str, Any]

#: What is varied, by the field of a row; "kept" is the number of kept tokens.
VARIED = ("N", "V", "D", "kept")

TOKENS_AHEAD = 8192
SHARES_AHEAD = (0.0, 0.75)


def exponent(sizes: Iterable[float], times: Iterable[float]) -> float:
    """k of times = c * sizes**k, by least squares of the logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(t) for t in times]).slope


def sweep(rows: list[Row], kind: str, varied: str) -> list[Row]:
    """Forward and backward at the base shape and at those that differ from it in one size; for "kept", in ignored."""
    whole = [r for r in rows if (r["kind"], r["direction"], r["dtype"]) == (kind, "both", "bfloat16")]
    if varied == "kept":
        return [r | {"kept": r["N"] - round(r["N"] * r["ignored"])} for r in whole if r["shape"] == "base"]
    return [r for r in whole if r["shape"] in (varied, "base") and r["ignored"] == 0]


def fits(rows: list[Row]) -> list[Row]:
    """The exponent of the median time by kind, loss and what is varied, where at least three sizes were measured."""
    found = []
    for kind, providers in PROVIDERS.items():
        for varied in VARIED:
            points = sweep(rows, kind, varied)
            for provider in providers:
                own = sorted((r[varied], r["ms"]["p50"]) for r in points if r["provider"] == provider.name)
                if len(own) < 3:
                    continue
                sizes, times = zip(*own, strict=True)
                found.append(
                    {"kind": kind, "provider": provider.name, "varied": varied, "exponent": exponent(sizes, times)}
                    | {"from": sizes[0], "to": sizes[-1], "points": len(own)}
                )
    return found


def plan_ahead(rows: list[Row], device: str) -> list[Row]:
    """Arithmetic, not measurement: models at more tokens than were measured.

    Memory is the package's formulas. Times are least work over the run's own rate: of the matrix products at the
    base shape for the linear loss, of our loss there for logits.
    """
    found = []
    measured = {(r["kind"], r["shape"]): r["N"] for r in rows}
    for kind, (baseline, *_, ours) in PROVIDERS.items():
        base = [r for r in sweep(rows, kind, "N") if r["shape"] == "base"]
        fused = next((r for r in base if r["provider"] == ours.name and "roof" in r), None)
        if fused is None:
            continue
        done = set()
        for model in MODELS:
            key = (model.V, model.D if kind == "linear" else 0)
            if key in done or measured.get((kind, model.name), 0) >= TOKENS_AHEAD:
                continue
            done.add(key)
            for share in SHARES_AHEAD:
                ahead = _linear_ahead if kind == "linear" else _logits_ahead
                found.append(
                    {"kind": kind, "model": model.name, "N": TOKENS_AHEAD, "ignored": share}
                    | {"V": model.V, "D": model.D, "baseline": baseline.name, "ours": ours.name}
                    | ahead(*key, share, fused, device)
                )
    return found


def _linear_ahead(V: int, D: int, share: float, fused: Row, device: str) -> Row:
    cost = linear_cost(TOKENS_AHEAD, V, D, num_ignored=round(TOKENS_AHEAD * share), device=device)
    rate = 1e12 * fused["roof"]
    return {
        "plain bytes": cost.plain_bytes,
        "bytes": cost.plan.bytes,
        "plan": cost.plan.plan,
        "plain seconds": cost.plain_flops / rate,
        "seconds": cost.flops / rate,
    }


def _logits_ahead(V: int, D: int, share: float, fused: Row, device: str) -> Row:
    kept = TOKENS_AHEAD - round(TOKENS_AHEAD * share)
    least = 2 * V * (2 * kept + TOKENS_AHEAD)
    return {
        "plain bytes": plain_logits_bytes(TOKENS_AHEAD, V, torch.bfloat16),
        "seconds": least / (1e9 * fused["rate"]),
    }
