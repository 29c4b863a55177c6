"""The ways to compute a loss of logits and its gradient, as a table: the first whose condition holds is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import grad_in_forward, kernel_reduction, pytorch_reduction, sharded
from .problem import LogitsProblem


class Way(NamedTuple):
    """One way to compute a loss of logits."""

    condition: Callable[[LogitsProblem], bool]
    loss: Callable[[LogitsProblem], Any]  #: computes the loss, or (loss, LossStats)
    saved: str  #: what is held for backward, beside targets and class weights


WAYS = {
    "sharded": Way(
        condition=lambda problem: problem.is_sharded,
        loss=sharded.loss,
        saved="the rank's logits; the normaliser of every row, merged over the ranks",
    ),
    "gradient in forward, reduced by the kernel": Way(
        condition=lambda problem: problem.has_gradient_in_forward and problem.is_reduced_by_kernel,
        loss=grad_in_forward.loss_reduced_by_kernel,
        saved="the gradient of the logits",
    ),
    "gradient in forward": Way(
        condition=lambda problem: problem.has_gradient_in_forward,
        loss=grad_in_forward.loss_reduced_by_pytorch,
        saved="the gradient of the logits",
    ),
    "reduced by the kernel": Way(
        condition=lambda problem: problem.is_reduced_by_kernel,
        loss=kernel_reduction.loss,
        saved="the logits; the normaliser of every row; the factor of all rows, and their token weights",
    ),
    "reduced by PyTorch": Way(
        condition=lambda problem: True,
        loss=pytorch_reduction.loss,
        saved="the logits; the normaliser of every row; its entropy, if that has a gradient",
    ),
}


def way_of(problem: LogitsProblem) -> Way:
    """The way that is taken for a problem."""
    for way in WAYS.values():
        if way.condition(problem):
            return way
    raise AssertionError("the last way takes every problem")
