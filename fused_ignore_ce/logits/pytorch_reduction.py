"""Any loss of logits: the results of their rows, which operations of PyTorch reduce."""

from __future__ import annotations

from typing import Any

from ..core.reduction import reduce_rows, weight_of_target
from ..core.rows import RowResults
from .problem import LogitsProblem
from .row_results import rows_call


def loss(problem: LogitsProblem) -> Any:
    """The loss, or (loss, LossStats)."""
    _, targets, call, reduction, *_ = problem
    compute, arguments = rows_call(problem)
    rows = RowResults(*compute(*arguments))
    target_weight = weight_of_target(targets, problem.weight, problem.probs)
    total = reduce_rows(rows.loss, rows.lse, targets, reduction, call.options.z_loss, target_weight)
    return problem.result(total, rows.loss, rows.lse, rows.predicted, rows.entropy)
