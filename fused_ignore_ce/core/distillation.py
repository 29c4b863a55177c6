"""The options of a distillation loss, and what all of its forms check."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .eager import autocasts, is_plain, is_tracing
from .options import (
    LossOptions,
    check_above_zero,
    check_choice,
    check_flag,
    check_number,
    check_temperature,
)
from .tensors import check_device, check_floating, check_indices, check_tensor, wrong_dtype, wrong_shape

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Tail = Literal["bucket", "renormalise"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
TAILS: tuple[Tail, ...] = get_args(Tail)


class DistillationOptions(NamedTuple):
    """How the loss of a row follows from the logits of the student and of the teacher."""

    options: LossOptions  # ignore_index, softcap and logit_scale of the student
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 1.0
    scale_by_temperature: bool = False
    teacher_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    tail: str = ""  # what becomes of all other classes where the teacher names the likeliest ones; else ""

    @property
    def share(self) -> float:
        """The factor of the divergence in the loss of a row."""
        return self.alpha * (self.temperature**2 if self.scale_by_temperature else 1.0)

    def checked(self) -> DistillationOptions:
        """The same options as plain numbers, or an error that names the one that is wrong."""
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_temperature(self.temperature)
        check_number("beta", self.beta)
        if self.divergence == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta: expected a number between 0 and 1, got {self.beta!r}, where the divergence is 0 for all "
                'distributions; divergence="forward_kl" and "reverse_kl" are its limits, divided by beta and 1 - beta'
            )
        check_number("alpha", self.alpha)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in [0, 1], got {self.alpha!r}")
        check_flag("scale_by_temperature", self.scale_by_temperature)
        if self.tail:
            check_choice("tail", self.tail, TAILS)
        softcap = self.teacher_softcap
        check_number("teacher_logit_scale", self.teacher_logit_scale)
        if softcap is not None:
            check_number("teacher_softcap", softcap)
            check_above_zero("teacher_softcap", softcap)
        return DistillationOptions(
            self.options.checked(),
            self.divergence,
            float(self.beta),
            float(self.temperature),
            float(self.alpha),
            self.scale_by_temperature,
            None if softcap is None else float(softcap),
            float(self.teacher_logit_scale),
            self.tail,
        )


def check_teacher(name: str, teacher: Any, input: Tensor) -> None:
    """Raises an error for a tensor of the teacher whose tokens are not those of the student."""
    check_tensor(name, teacher)
    check_device(name, teacher, input.device)
    if teacher.dim() == 0 or teacher.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"{name}: expected the tokens of input, whose shape is {tuple(input.shape)}, got {tuple(teacher.shape)}"
        )


def check_same_classes(name: str, classes: int, teacher_classes: int) -> None:
    if teacher_classes != classes:
        fewer = min(classes, teacher_classes)
        raise ValueError(
            f"{name}: expected a teacher with the student's {classes} classes, got {teacher_classes}; if the first "
            f"{fewer} are the same tokens, cut the head's weight and bias (or the logits' last dimension) to [:{fewer}]"
        )


def check_teacher_head(teacher_input: Tensor, teacher_weight: Any, teacher_bias: Any, classes: int) -> None:
    """Raises an error for a head that the teacher's hidden states cannot be multiplied with."""
    check_floating("teacher_input", teacher_input)
    for name, t, dims in (("teacher_weight", teacher_weight, 2), ("teacher_bias", teacher_bias, 1)):
        if t is None and dims == 1:
            continue
        check_tensor(name, t)
        if t.dim() != dims:
            raise wrong_shape(name, "(V, E)" if dims == 2 else "(V,)", t)
        check_same_classes(name, classes, t.shape[0])
        casts = autocasts(t.device) and t.is_floating_point()
        if t.dtype != teacher_input.dtype and not casts:
            raise wrong_dtype(name, teacher_input.dtype, t, "teacher_input")
        check_device(name, t, teacher_input.device, "teacher_input")
    if teacher_weight.shape[1] != teacher_input.shape[-1]:
        raise RuntimeError(
            f"teacher_weight: expected shape (V, {teacher_input.shape[-1]}), as teacher_input has this size, got "
            f"{tuple(teacher_weight.shape)}"
        )


def check_top_k(ids: Any, log_probs: Any, input: Tensor, classes: int) -> None:
    """Raises an error for ids that are no classes, and for numbers that are no log-probabilities."""
    check_teacher("teacher_ids", ids, input)
    check_teacher("teacher_log_probs", log_probs, input)
    check_floating("teacher_log_probs", log_probs)
    if ids.dtype != torch.int64:
        raise TypeError(f"teacher_ids: expected dtype int64, got {ids.dtype}; pass teacher_ids.long()")
    if ids.shape != log_probs.shape or not ids.shape[-1]:
        raise ValueError(
            f"teacher_log_probs: expected the shape of teacher_ids, {tuple(ids.shape)}, with at least one id for a "
            f"token, got {tuple(log_probs.shape)}"
        )
    above = (log_probs > 0.0).any()
    message = "teacher_log_probs: expected natural logarithms of probabilities, at most 0, got some above 0"
    if ids.device.type == "cpu" and is_plain(ids):  # elsewhere gather asserts that ids are classes
        wrong = ids[(ids < 0) | (ids >= classes)]
        if len(wrong):
            raise IndexError(f"teacher_ids: expected classes in [0, {classes}), got {int(wrong[0])}")
        if above:
            raise ValueError(message)
    elif not ids.is_meta:
        torch._assert_async(~above, message)


def check_target(target: Any, shape: torch.Size, device: torch.device, alpha: float) -> None:
    """Raises an error for targets that are not class indices of these rows."""
    if target is None:
        if alpha < 1.0:
            raise ValueError(f"target: expected class indices, as alpha={alpha} mixes in a cross entropy, got None")
        return
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor of class indices or None, got {type(target).__name__}")
    check_indices(target)
    if target.shape != shape:
        raise ValueError(f"target: expected shape {tuple(shape)}, as input's tokens, got {tuple(target.shape)}")
    check_device("target", target, device)


def refuse_process_group(process_group: Any) -> None:
    if process_group is not None:
        raise NotImplementedError(
            "process_group: distillation with a vocabulary that is sharded over ranks is not supported yet; gather "
            "the head of each side, or pass each rank's own tokens and the whole heads"
        )


def refuse_create_graph() -> None:
    if torch.is_grad_enabled() and not is_tracing():
        raise RuntimeError(
            "create_graph: expected False, as distillation losses have no second derivative here, got True; where you "
            "need one, write the divergence with torch.nn.functional.kl_div"
        )
