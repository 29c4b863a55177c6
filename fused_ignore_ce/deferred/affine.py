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

#: ("mul", number, tensor of one element or vector over the classes), ("div", the same), ("tanh", None), ("add", a
#: vector over the classes), ("sub", the same) or ("plus", another form with steps).
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
    by_class = value.shape == product.weight.shape[:1]
    if kind in ("mul", "div") and by_class:
        exact = torch.promote_types(value.dtype, product.weight.dtype) == product.weight.dtype
        return ((kind, value),) if exact and product.layout == "plain" else None
    if kind in ("mul", "div"):
        promotes = value.dim() > 0 and value.dtype != product.dtype
        return None if value.numel() != 1 or promotes else ((kind, value.reshape(())),)
    return ((kind, value),) if by_class else None


class Affine(NamedTuple):
    """Logits softcap * tanh(scale * x / softcap) of the product x; without a softcap scale * x."""

    product: Product
    scale: float
    softcap: float | None


def affine(form: Form) -> Affine | None:
    """The same logits up to rounding, in the form that the linear loss takes; None if they have no such form."""
    found = _sum_of(form)
    return None if found is None else Affine(_as_one(found[0]), *found[1:])


def _sum_of(form: Form) -> tuple[list[Product], float, float | None] | None:
    """The products whose sum is x, with the scale and the softcap of `Affine`."""
    found = steps_of(form)
    if found is None:
        return None
    products, scale, cap = [found[0]], 1.0, None
    for kind, value in found[1]:
        if kind == "tanh":
            if cap is not None:
                return None
            cap = 1.0
        elif kind == "plus":
            other = _sum_of(value)
            if other is None or cap is not None or other[2] is not None:
                return None
            products = _scaled(products, scale) + _scaled(other[0], other[1])
            scale = 1.0
        elif kind in ("add", "sub"):
            first = products[0]
            if cap is not None or scale == 0.0 or (first.layout != "plain" and first.bias is not None):
                return None
            value = -value if kind == "sub" else value
            unscaled = value if scale == 1.0 else value / scale
            products[0] = first._replace(bias=unscaled if first.bias is None else first.bias + unscaled)
        elif isinstance(value, Tensor):
            if cap is not None:
                return None
            products = _scaled(products, value if kind == "mul" else 1 / value)
        else:
            number = value if kind == "mul" else 1 / value if value else math.nan
            scale *= number
            cap = None if cap is None else cap * number
    if not math.isfinite(scale) or (cap is not None and not cap > 0):
        return None
    return products, scale, cap


def _scaled(products: list[Product], factor: Any) -> list[Product]:
    """The products times a number, a tensor of one element, or a vector over the classes (DoRA and IA3 on a head)."""

    def scaled(t: Tensor) -> Tensor:
        return t * (factor.to(t.dtype) if isinstance(factor, Tensor) else factor)

    def one(product: Product) -> Product:
        hidden, weight, bias, *_ = product
        if isinstance(factor, Tensor) and factor.dim():
            weight = weight * factor.to(weight.dtype).unsqueeze(1)
        else:
            hidden = scaled(hidden)
        return product._replace(hidden=hidden, weight=weight, bias=None if bias is None else scaled(bias))

    return products if isinstance(factor, float) and factor == 1.0 else [one(p) for p in products]


def _as_one(products: list[Product]) -> Product:
    """The sum of products with the same rows, as one with the features of all of them (LoRA on a head)."""
    first, *others = products
    if not others:
        return first
    weights: dict[int, Tensor] = {}
    hidden = {id(p.hidden): p.hidden.to(first.hidden.dtype) for p in products}
    bias: Tensor | None = None
    for p in products:
        weight, key = p.weight.to(first.weight.dtype), id(p.hidden)
        weights[key] = weights[key] + weight if key in weights else weight
        if p.bias is not None:
            more = p.bias.to(first.weight.dtype)
            bias = more if bias is None else bias + more
    return first._replace(
        hidden=torch.cat([*hidden.values()], -1), weight=torch.cat([*weights.values()], -1), bias=bias
    )


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
