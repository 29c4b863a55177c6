"""Divergences of the softmax of deferred logits from that of others, as the loss from hidden states of both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses.distillation import fused_linear_distillation_loss
from .affine import Affine, affine
from .expression import Expression, Form, is_form, leaves, log_softmax_of


class Divergence(NamedTuple):
    """The divergence KL(p | q) of every row, summed over the classes: p and q are the softmax of these forms."""

    p: Form
    q: Form


def divergence(form: Form) -> Divergence | None:
    """The divergence whose terms a form has, class by class: `F.kl_div`, or p * (log p - log q) written out.

    None if it has others.
    """
    if not isinstance(form, Expression):
        return None
    if form.name == "kl_div":
        log_q, target, *_ = form.args
        p = log_softmax_of(target) if form.kwargs.get("log_target", False) else _softmax_of(target)
        return _of(p, log_softmax_of(log_q))
    if form.name in ("mul", "multiply"):
        for p, difference in (form.args, form.args[::-1]):
            if isinstance(difference, Expression) and difference.name in ("sub", "subtract"):
                log_p, log_q = map(log_softmax_of, difference.args[:2])
                if not difference.kwargs and _is_same(_softmax_of(p), log_p):
                    return _of(log_p, log_q)
    return None


def _of(p: Any, q: Any) -> Divergence | None:
    return Divergence(p, q) if is_form(p) and is_form(q) else None


def _softmax_of(form: Any) -> Any:
    """The form whose probabilities these are, by `softmax` or as exp(log_softmax); None if they are none."""
    if not isinstance(form, Expression):
        return None
    if form.name == "softmax" and form.kwargs.get("dtype") != torch.float64:
        return form.args[0]
    return log_softmax_of(form.args[0]) if form.name == "exp" else None


def _is_same(a: Any, b: Any) -> bool:
    """Whether two forms are the same operations on the same tensors."""
    if a is b:
        return True
    if isinstance(a, Expression) and isinstance(b, Expression):
        return (a.func, a.kwargs, len(a.args)) == (b.func, b.kwargs, len(b.args)) and all(map(_is_same, a.args, b.args))
    return isinstance(a, (bool, int, float)) and type(a) is type(b) and a == b


def loss(form: Form, reduction: str, options: dict[str, Any]) -> Tensor | None:
    """The divergence that a form has, of every row or summed over them, by `fused_linear_distillation_loss`.

    Its `options` are those that say how it is computed. None where it cannot express this divergence: where none of the
    two sides is constant, or where the logits of one are no product with scales and a softcap.
    """
    found = divergence(form)
    if found is None or form.classes_second or any(p.product.layout != "plain" for p in found):
        return None
    is_forward = not _needs_gradient(found.p)
    if not is_forward and _needs_gradient(found.q):
        return None
    student, teacher = (affine(side) for side in (found if not is_forward else reversed(found)))
    if student is None or teacher is None:
        return None
    casts = _casts(student, teacher)
    if casts is None:
        return None
    (h, w, b, *_), scale, cap = student
    (teacher_h, teacher_w, teacher_b, *_), teacher_scale, teacher_cap = teacher
    with student.product.autocast(casts):
        value = fused_linear_distillation_loss(
            h, w, teacher_h, teacher_w, linear_bias=b, teacher_bias=teacher_b, reduction=reduction,
            divergence="forward_kl" if is_forward else "reverse_kl", softcap=cap, logit_scale=scale,
            teacher_softcap=teacher_cap, teacher_logit_scale=teacher_scale,
            loss_dtype=torch.promote_types(form.dtype, torch.float32), **options,
        )  # fmt: skip
    assert isinstance(value, Tensor)  # no statistics were asked for
    return value.to(form.dtype)


def _needs_gradient(form: Form) -> bool:
    return any(t.requires_grad for t, _ in leaves(form))


def _casts(student: Affine, teacher: Affine) -> bool | None:
    """Whether both products need autocast to the student's dtype; None if they need different ones."""
    if all(t.dtype == side.product.dtype for side in (student, teacher) for t in side.product.tensors):
        return False
    return True if student.product.dtype == teacher.product.dtype and student.product.dtype.itemsize == 2 else None
