"""How cost grows with a size: exponents that are fitted to a run's figures."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

from .providers import PROVIDERS

Row = dict[str, Any]

#: The sizes that are varied, as fields of a row; "kept" is the number of kept tokens.
VARIED = ("N", "V", "D", "kept")


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
    """The k of time = c * size**k by kind, loss and varied size, where at least three sizes were measured.

    Times are medians, and k comes from least squares of the logarithms.
    """
    found = []
    for kind, varied in itertools.product(PROVIDERS, VARIED):
        points = sweep(rows, kind, varied)
        for provider in PROVIDERS[kind]:
            own = sorted((r[varied], r["ms"]["p50"]) for r in points if r["provider"] == provider.name)
            if len(own) >= 3:
                sizes, times = zip(*own, strict=True)
                slope = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, times)]).slope
                found.append(
                    {"kind": kind, "provider": provider.name, "varied": varied, "exponent": slope}
                    | {"from": sizes[0], "to": sizes[-1], "points": len(own)}
                )
    return found
