"""The loss of logits whose vocabulary is sharded: the ranks exchange sums of rows, and each reduces the same rows."""

from __future__ import annotations

from typing import Any

from ..core.reduction import reduce_rows
from ..core.rows import RowResults
from .problem import LogitsProblem
from .row_results import rows_call


def loss(problem: LogitsProblem) -> Any:
    """The loss, or (loss, LossStats); the same bits on all ranks."""
    _, targets, call, reduction, *_ = problem
    compute, arguments = rows_call(problem)
    rows = RowResults(*compute(*arguments))
    total = reduce_rows(rows.loss, rows.lse, targets, reduction, call.options.z_loss, rows.target_weight)
    if call.with_stats and problem.probs is not None:
        problem = problem._replace(targets=targets.with_classes(rows.likeliest))
    return problem.result(total, rows.loss, rows.lse, rows.predicted, rows.entropy)
