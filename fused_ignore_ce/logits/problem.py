"""A call of the loss of logits, checked: what it computes, which follows from its tensors and options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choice import choose
from ..core.eager import autocasts, is_plain, refuse_transforms, wants_grad
from ..core.options import LossOptions, ReductionOptions
from ..core.reduction import Targets, finished, loss_dtype_of, prepare_targets, statistics
from ..core.rows import Logits, acc_dtype, classes_last
from ..core.tensors import (
    LogitsTensors,
    Sizes,
    check_ignored,
    check_inplace,
    check_logits,
    check_token_weight,
    holds_probabilities,
)


class RowCall(NamedTuple):
    """The settings that all rows of a call share."""

    options: LossOptions
    with_stats: bool
    backend: str
    group: str | None  # the name of the process group that the vocabulary is sharded over


class LogitsProblem(NamedTuple):
    """All that the loss of logits depends on, checked."""

    tensors: LogitsTensors
    targets: Targets
    call: RowCall
    reduction: ReductionOptions
    loss_dtype: torch.dtype
    classes_dim: int  # of input and of probability targets
    inplace_backward: bool
    grad_in_forward: bool

    @property
    def probs(self) -> Tensor | None:
        target = self.tensors.target
        return target if holds_probabilities(target) else None

    @property
    def weight(self) -> Tensor | None:
        weight = self.tensors.weight
        return None if weight is None else weight.contiguous()

    @property
    def logits(self) -> Logits:
        probs = self.probs
        return Logits(
            classes_last(self.tensors.input, self.classes_dim),
            self.targets.target,
            self.weight,
            None if probs is None else classes_last(probs, self.classes_dim),
        )

    # The conditions that `ways.WAYS` is made of.

    @property
    def is_sharded(self) -> bool:
        return self.call.group is not None

    @property
    def has_gradient_in_forward(self) -> bool:
        """Whether the gradient is asked for along with the loss, and only logits have one."""
        return (
            self.grad_in_forward
            and wants_grad(self.tensors.input)
            and not _differentiable(self.probs)
            and self._is_sum_of_rows
        )

    @property
    def is_reduced_by_kernel(self) -> bool:
        """Whether the backend has a kernel for the sum of the rows, which adds no z-loss."""
        return self.call.backend == "triton" and self.call.options.z_loss == 0.0 and self._is_sum_of_rows

    @property
    def _is_sum_of_rows(self) -> bool:
        """Whether the loss is a sum of the rows' losses whose factors are constants, so that forward knows them."""
        reduction = self.reduction
        return (
            reduction.reduction != "none"
            and reduction.return_stats != "differentiable"
            and is_plain(self.tensors.input)
            and not _differentiable(self.targets.token_weight)
            and not _differentiable(reduction.normalizer)
        )

    def result(
        self,
        loss: Tensor,
        of_rows: Tensor | None = None,
        lse: Tensor | None = None,
        predicted: Tensor | None = None,
        entropy: Tensor | None = None,
        *,
        num_tokens: Tensor | None = None,
    ) -> Any:
        """What the caller gets: the loss in its dtype; with statistics, which are then needed, (loss, LossStats).

        `of_rows` are the losses of rows, without z-loss and token weights.
        """
        loss = finished(loss, self.targets, self.reduction, self.loss_dtype)
        if not self.call.with_stats:
            return loss
        assert of_rows is not None
        assert lse is not None
        assert predicted is not None
        assert entropy is not None
        return loss, statistics(self.targets, self.reduction, of_rows, lse, predicted, entropy, num_tokens)


def _differentiable(factor: Any) -> bool:
    return isinstance(factor, Tensor) and factor.requires_grad


class CheckedCall(NamedTuple):
    """A checked call: what follows from the sizes, dtypes and devices of its tensors and from its options."""

    call: RowCall
    sizes: Sizes
    loss_dtype: torch.dtype


class Request(NamedTuple):
    """The arguments of a call, except its tensors and the options that apply after the kernels."""

    ids: tuple[int, ...]
    options: LossOptions
    with_stats: bool
    loss_dtype: torch.dtype | None
    backend: str
    group: str | None
    classes_dim: int


_CHECKED: dict[Any, CheckedCall] = {}
_MOST_CHECKED = 1024


def logits_problem(
    tensors: LogitsTensors,
    ids: tuple[int, ...],
    options: LossOptions,
    reduction: ReductionOptions,
    backend: str,
    group: str | None,
    *,
    classes_dim: int = 1,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
) -> LogitsProblem:
    """Checks the tensors, and brings them into the form of the backends."""
    input, target, _, token_weight = tensors
    with_stats = bool(reduction.return_stats)
    request = Request(ids, options, with_stats, reduction.loss_dtype, backend, group, classes_dim)
    call, sizes, loss_dtype = (checked_before if is_plain(input) else check_call)(tensors, request)
    targets = prepare_targets(
        target, token_weight, ids, sizes, acc=acc_dtype(input.dtype), with_stats=with_stats, sharded=group is not None
    )
    problem = LogitsProblem(
        tensors, targets, call, reduction, loss_dtype, len(sizes.batch), inplace_backward, grad_in_forward
    )
    refuse_transforms(input, problem.probs)
    if inplace_backward:
        check_inplace(problem.logits.x)
    return problem


def checked_before(tensors: LogitsTensors, request: Request) -> CheckedCall:
    """What `check_call` returns, cached by all that it looks at: of equal training steps, only the first is checked."""
    input, target, weight, token_weight = tensors
    key = (
        form_of(input), form_of(target), form_of(weight), form_of(token_weight), request,
        torch.is_grad_enabled(), autocasts(input.device),
    )  # fmt: skip
    found = _CHECKED.get(key)
    if found is None:
        found = check_call(tensors, request)
        if len(_CHECKED) == _MOST_CHECKED:
            _CHECKED.clear()
        _CHECKED[key] = found
    return found


def check_call(tensors: LogitsTensors, request: Request) -> CheckedCall:
    input, target, weight, token_weight = tensors
    sizes = check_logits(input, target, weight, classes_dim=request.classes_dim)
    check_ignored(request.ids, target)
    check_token_weight(token_weight, sizes.rows, target.device)
    call = RowCall(request.options, request.with_stats, choose(request.backend, input.device), request.group)
    return CheckedCall(call, sizes, loss_dtype_of(request.loss_dtype, input, target, weight))


def form_of(t: Tensor | None) -> Any:
    """The properties of a tensor that checks look at; the type of anything else, which no check accepts."""
    if t is None:
        return None
    return (t.shape, t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else type(t)
