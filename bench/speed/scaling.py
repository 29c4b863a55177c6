"""A run's losses as a table, and how cost grows with a size: exponents that are fitted to the run's figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy
from pandas import DataFrame, json_normalize

from .providers import PROVIDERS
from .workload import Base, Case

Row = dict[str, Any]

#: The sizes that are varied, as columns of the table; "kept" is the number of kept tokens.
VARIED = ("N", "V", "D", "kept")

#: The columns that say what a figure of time or memory belongs to.
OF = [*Case._fields, "provider"]


def losses(times: Sequence[Row], memory: Sequence[Row] = ()) -> DataFrame:
    """A table with a row for each case and loss: its time and its peak memory, where a result file has them."""
    found = json_normalize([*times, *memory]).reindex(columns=[*OF, "ms.p50", "ratio", "rate", "roof", "bytes"])
    found = found.groupby(OF, sort=False, as_index=False).first()
    return found.assign(kept=found["N"] - (found["N"] * found["ignored"]).astype(float).round())


def sweep(rows: DataFrame, varied: str) -> DataFrame:
    """Forward and backward at the base shape and at shapes that differ from it in one size.

    For "kept", which is no size of the shape, these are the rows of the base shape with every share of ignored tokens.
    """
    whole = rows.query("direction == 'both' and dtype == 'bfloat16'")
    if varied in Base._fields:
        return whole[whole["shape"].isin(["base", varied]) & (whole["ignored"] == 0)]
    return whole[whole["shape"] == "base"]


def fits(rows: Sequence[Row]) -> list[Row]:
    """Fits k of time = c * size**k, by kind, loss and varied size, where at least three sizes were measured.

    Times are medians, and k comes from least squares of the logarithms.
    """
    every, found = losses(rows), []
    for kind, varied in itertools.product(PROVIDERS, VARIED):
        for provider, own in sweep(every, varied).query("kind == @kind").groupby("provider", sort=False):
            if len(own) >= 3:
                exponent, _ = numpy.polyfit(numpy.log(own[varied]), numpy.log(own["ms.p50"]), 1).tolist()
                found.append(
                    {"kind": kind, "provider": provider, "varied": varied, "exponent": exponent}
                    | {"from": int(own[varied].min()), "to": int(own[varied].max()), "points": len(own)}
                )
    return found
