"""The losses from hidden states, of logits that are a product with scales, biases and a softcap."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.eager import autocasts
from ..losses.linear_cross_entropy import fused_linear_cross_entropy
from ..losses.log_probs import fused_linear_log_probs
from .expression import Expression, Form, is_form
from .product import Product

#: ("mul", number or tensor of one element), ("div", the same), ("tanh", None), ("add", a vector over the classes),
#: ("sub", the same) or ("plus", another form with steps).
_Step = tuple[str, Any]
_KINDS = {
    **dict.fromkeys(("mul", "multiply", "rmul"), "mul"),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), "div"),
    **dict.fromkeys(("add", "radd"), "add"),
    **dict.fromkeys(("sub", "subtract"), "sub"),
    "tanh": "tanh",
    "to": "to",
}


def steps_of(form: Form) -> tuple[Product, tuple[_Step, ...]] | None:
    """The product that a form is made of, and the steps from there; None if there are other operations."""
    if isinstance(form, Product):
        return form, ()
    kind, (first, *rest) = _KINDS.get(form.name), form.args
    if not is_form(first) and kind in ("mul", "add"):
        first, rest = rest[0], [first]
    found = steps_of(first) if kind is not None and is_form(first) and not form.kwargs else None
    step = None if found is None or len(rest) > 1 else _step(found[0], kind or "", *rest)
    return None if found is None or step is None else (found[0], found[1] + step)


def _step(product: Product, kind: str, value: Any = None) -> tuple[_Step, ...] | None:
    """The step of an operation, which a cast does not need; None if it is none."""
    if kind == "to":
        return None if value == torch.float64 else ()  # the linear loss would be a float32 one
    if kind == "tanh":
        return ((kind, None),)
    if is_form(value):
        plain = product.layout == value.product.layout == "plain"
        return (("plus", value),) if kind == "add" and plain and steps_of(value) is not None else None
    if kind in ("mul", "div") and isinstance(value, (int, float)) and not isinstance(value, bool):
        return ((kind, value),)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if kind in ("mul", "div"):
        promotes = value.dim() > 0 and value.dtype != product.dtype
        return None if value.numel() != 1 or promotes else ((kind, value.reshape(())),)
    return ((kind, value),) if value.shape == product.weight.shape[:1] else None


class Affine(NamedTuple):
    """Logits softcap * tanh(scale * x / softcap) of the product x; without a softcap scale * x."""

    product: Product
    scale: float
    softcap: float | None


def affine(form: Form) -> Affine | None:
    """The same logits up to rounding, in the form that the linear loss takes; None if they have no such form."""
    found = steps_of(form)
    if found is None:
        return None
    product, steps = found
    scale, cap = 1.0, None
    for kind, value in steps:
        if kind == "tanh":
            if cap is not None:
                return None
            cap = 1.0
        elif kind == "plus":
            other = affine(value)
            if other is None or cap is not None or other.softcap is not None:
                return None
            product, scale = _sum(product, scale, other), 1.0
        elif kind in ("add", "sub"):
            if cap is not None or scale == 0.0 or (product.layout != "plain" and product.bias is not None):
                return None
            value = -value if kind == "sub" else value
            unscaled = value if scale == 1.0 else value / scale
            product = product._replace(bias=unscaled if product.bias is None else product.bias + unscaled)
        elif isinstance(value, Tensor):
            if cap is not None:
                return None
            product = _scaled(product, value if kind == "mul" else 1 / value)
        else:
            number = value if kind == "mul" else 1 / value if value else math.nan
            scale *= number
            cap = None if cap is None else cap * number
    if not math.isfinite(scale) or (cap is not None and not cap > 0):
        return None
    return Affine(product, scale, cap)


def _scaled(product: Product, factor: Any) -> Product:
    def scaled(t: Tensor) -> Tensor:
        return t * (factor.to(t.dtype) if isinstance(factor, Tensor) else factor)

    return product._replace(hidden=scaled(product.hidden), bias=None if product.bias is None else scaled(product.bias))


def _sum(mine: Product, scale: float, other: Affine) -> Product:
    """The sum of two scaled products with the same rows, as one with the features of both (LoRA on a head)."""
    mine = mine if scale == 1.0 else _scaled(mine, scale)
    others = _scaled(other.product, other.scale)
    hidden = torch.cat([mine.hidden, others.hidden.to(mine.hidden.dtype)], -1)
    weight = torch.cat([mine.weight, others.weight.to(mine.weight.dtype)], -1)
    bias = None if others.bias is None else others.bias.to(mine.weight.dtype)
    if mine.bias is not None:
        bias = mine.bias if bias is None else mine.bias + bias
    return mine._replace(hidden=hidden, weight=weight, bias=bias)


def cross_entropy(form: Form, target: Tensor, options: dict[str, Any]) -> Any:
    """`fused_linear_cross_entropy` with its `options`, or None where it cannot express these logits.

    The result has the dtype that `F.cross_entropy` of the logits would have.
    """
    if len(form.shape) > 2 and not form.classes_second:
        return None
    is_probs = target.is_floating_point() and target.shape == form.shape
    dtype = torch.promote_types(form.dtype, target.dtype) if is_probs else form.dtype
    if autocasts(form.product.hidden.device):
        dtype = torch.float32
    dtype = options.get("loss_dtype") or dtype
    if is_probs and form.classes_second:
        target = target.movedim(1, -1)
    found = _linear_loss(fused_linear_cross_entropy, form, target, options)
    if isinstance(found, tuple):
        return found[0].to(dtype), found[1]
    return None if found is None else found.to(dtype)


def log_probs(form: Form, target: Tensor, options: dict[str, Any]) -> Any:
    """`fused_linear_log_probs` of these logits, or None, as `cross_entropy`; (..., 1) as the target is."""
    found = _linear_loss(fused_linear_log_probs, form, target.squeeze(-1), options)
    return None if found is None else found.unsqueeze(-1)


def _linear_loss(function: Any, form: Form, target: Tensor, options: dict[str, Any]) -> Any:
    found = affine(form)
    if found is None:
        return None
    (hidden, weight, bias, dtype, *_), scale, cap = found
    if cap is not None and ("softcap" in options or "logit_scale" in options):
        return None
    options = {**options, "softcap": options.get("softcap", cap)}
    options["logit_scale"] = scale * options.get("logit_scale", 1.0)
    class_weight = options.get("weight")
    if class_weight is not None and class_weight.dtype == form.dtype:  # the linear loss wants that of hidden states
        options["weight"] = class_weight.to(torch.promote_types(class_weight.dtype, dtype))
    # Under autocast to the product's dtype, the loss is float32 until its caller casts it.
    half = dtype in (torch.float16, torch.bfloat16)
    if bias is not None and not half:
        bias = bias.to(weight.dtype)
    with found.product.autocast(half):
        return function(hidden, weight, target, linear_bias=bias, **options)


def describe(form: Form) -> str:
    """The form as a report shows it, such as "log_softmax(logits)"."""
    if not isinstance(form, Expression) or steps_of(form) is not None:
        return "logits"
    return f"{form.name}({', '.join(describe(a) for a in form.args if is_form(a))})"
