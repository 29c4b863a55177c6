"""How cost grows with a size: exponents that are fitted to a run's figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from .providers import PROVIDERS

Row = dict[str, Any]

#: The sizes that are varied, as fields of a row; "kept" is the number of kept tokens.
VARIED = ("N", "V", "D", "kept")


def exponent(sizes: Iterable[float], times: Iterable[float]) -> float:
    """The k of times = c * sizes**k, by least squares of the logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(t) for t in times]).slope


def sweep(rows: list[Row], kind: str, varied: str) -> list[Row]:
    """Rows of forward and backward at the base shape and at shapes that differ from it in one size.

    Where "kept" is varied, these are the rows of the base shape with every share of ignored tokens.
    """
    whole = [r for r in rows if (r["kind"], r["direction"], r["dtype"]) == (kind, "both", "bfloat16")]
    if varied == "kept":
        return [
            r | {"kept": r["N"] - round(r["N"] * r["ignored"]), "percent": 100 * r["ignored"]}
            for r in whole
            if r["shape"] == "base"
        ]
    return [r for r in whole if r["shape"] in (varied, "base") and r["ignored"] == 0]


def fits(rows: list[Row]) -> list[Row]:
    """The exponent of the median time by kind, loss and varied size, where at least three sizes were measured."""
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
