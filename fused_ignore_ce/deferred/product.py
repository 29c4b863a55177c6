"""The algebra of logits that are not there: hidden states, weight, bias, and the operations applied since.

Operations on rows are applied to the hidden states at once, slices of the vocabulary to weight and bias; casts, scales,
the softcap's tanh and added biases are kept as steps. What is not one of these is not recorded: `record` returns None.
Everything here is a function of tuples, so that torch.compile can trace it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear.functional import fused_linear_cross_entropy

#: Steps: ("cast", dtype), ("mul", number or 0-d tensor), ("div", the same), ("tanh", None), ("add", (V,) tensor).
Step = tuple[str, Any]

_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_SCALES = {
    "mul": "mul", "multiply": "mul", "__mul__": "mul", "__rmul__": "mul",
    "div": "div", "divide": "div", "true_divide": "div", "__truediv__": "div",
}  # fmt: skip
_SUMS = {"add": 1, "__add__": 1, "__radd__": 1, "sub": -1, "subtract": -1, "__sub__": -1}
#: Operations on rows, with the positions of their arguments that are dimensions, and those arguments' names.
_ROW_OPERATIONS = {
    "unsqueeze": ((0, "dim"),),
    "squeeze": ((0, "dim"),),
    "transpose": ((0, "dim0"), (1, "dim1")),
    "swapaxes": ((0, "axis0"), (1, "axis1")),
    "flatten": ((0, "start_dim"), (1, "end_dim")),
    "narrow": ((0, "dim"),),
    "select": ((0, "dim"),),
    "index_select": ((0, "dim"),),
    "split": ((1, "dim"),),
    "chunk": ((1, "dim"),),
    "unbind": ((0, "dim"),),
}
_DEFAULT_DIMS = {"split": (0,), "chunk": (0,), "unbind": (0,)}


class Product(NamedTuple):
    """Logits (..., V) = steps(hidden @ weight.T + bias); with `classes_second`, then moved to (N, V, ...)."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    linear_dtype: torch.dtype  # of the matrix product's result
    dtype: torch.dtype  # of the logits
    steps: tuple[Step, ...] = ()
    classes_second: bool = False

    @property
    def shape(self) -> torch.Size:
        *lead, V = *self.hidden.shape[:-1], self.weight.shape[0]
        return torch.Size([lead[0], V, *lead[1:]] if self.classes_second else [*lead, V])

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the logits depend on."""
        values = [value for _, value in self.steps if isinstance(value, Tensor)]
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias]), *values]

    def with_tensors(self, tensors: list[Tensor]) -> Product:
        """The same product of other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        hidden, weight = next(rest), next(rest)
        bias = None if self.bias is None else next(rest)
        steps = tuple((kind, next(rest) if isinstance(value, Tensor) else value) for kind, value in self.steps)
        return self._replace(hidden=hidden, weight=weight, bias=bias, steps=steps)

    def logits(self) -> Tensor:
        """The logits, by the operations that were asked for, in their order."""
        with self.autocast(self.linear_dtype != self.hidden.dtype):
            x = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        for kind, value in self.steps:
            if kind == "cast":
                x = x.to(value)
            elif kind == "mul":
                x = x * value
            elif kind == "div":
                x = x / value
            elif kind == "tanh":
                x = x.tanh()
            else:
                x = x + value
        return x.movedim(-1, 1) if self.classes_second else x

    def autocast(self, enabled: bool) -> torch.autocast:
        dtype = self.linear_dtype if enabled else None
        return torch.autocast(self.hidden.device.type, dtype=dtype, enabled=enabled)

    def record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product after an operation, or a list of products; None if the operation is not a recorded one."""
        if name in _CASTS and not args and not kwargs:
            return self._cast(_CASTS[name])
        if name in ("to", "type_as"):
            return self._to(args, kwargs)
        if name in ("contiguous", "clone") and not args and not kwargs:
            return self
        if name == "detach":
            return self.with_tensors([t.detach() for t in self.tensors])
        if self.classes_second:
            return None
        if name == "tanh":
            return self._step("tanh", None)
        if name in _SCALES and len(args) == 1 and not kwargs:
            return self._scale(_SCALES[name], args[0])
        if name in _SUMS and len(args) == 1 and not kwargs:
            return self._add(args[0], _SUMS[name])
        if name == "__getitem__":
            return self._index(args[0])
        if name in ("view", "reshape"):
            return self._reshape(args or tuple(kwargs.values()))
        if name in ("permute", "movedim", "moveaxis", "transpose", "swapaxes", "swapdims"):
            return self._permute(name, args, kwargs)
        if name in _ROW_OPERATIONS:
            return self._row_operation(name, args, kwargs)
        return None

    def _step(self, kind: str, value: Any) -> Product:
        return self._replace(steps=(*self.steps, (kind, value)))

    def _cast(self, dtype: torch.dtype) -> Product | None:
        if not dtype.is_floating_point:
            return None
        return self if dtype == self.dtype else self._step("cast", dtype)._replace(dtype=dtype)

    def _to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        dtype, device = self.dtype, self.hidden.device
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
                device = torch.device(value)
            elif value is not None and not isinstance(value, bool):
                return None  # a memory format
        same = device.type == self.hidden.device.type and device.index in (None, self.hidden.device.index)
        return self._cast(dtype) if same else None

    def _scale(self, kind: str, value: Any) -> Product | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self._step(kind, value)
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
            return self._step(kind, value)
        if (
            isinstance(value, Tensor)
            and value.numel() == 1
            and value.dim() <= len(self.shape)
            and (value.dtype == self.dtype)
        ):
            return self._step(kind, value.reshape(()))
        return None

    def _add(self, value: Any, sign: int) -> Product | None:
        """A vector over the vocabulary is added; the logits of another head are more features of one head."""
        V = self.weight.shape[0]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        if value.numel() != V or value.dim() > len(self.shape) or value.shape[-1:] != (V,):
            return None
        value = value.reshape(V)
        return self._step("add", value if sign > 0 else -value)._replace(
            dtype=torch.promote_types(self.dtype, value.dtype)
        )

    def plus(self, other: Product) -> Product | None:
        """The sum of two products with the same rows, as one with the features of both (LoRA on a head)."""
        if self.shape != other.shape or self.dtype != other.dtype or self.linear_dtype != other.linear_dtype:
            return None
        terms = [term for p in (self, other) if (term := p._affine()) is not None]
        if self.classes_second or other.classes_second or len(terms) < 2 or terms[0][3:] != (1.0, None):
            return None
        (h, w, b, _, _), (other_h, other_w, other_b, scale, cap) = terms
        if cap is not None or h.dtype != other_h.dtype or w.dtype != other_w.dtype:
            return None
        return Product(
            torch.cat([h, other_h * scale], -1),
            torch.cat([w, other_w], -1),
            b if other_b is None else other_b * scale if b is None else b + other_b * scale,
            self.linear_dtype,
            self.dtype,
            (("cast", self.dtype),) if self.dtype != self.linear_dtype else (),
        )

    def _index(self, index: Any) -> Product | None:
        """An index that leaves the vocabulary whole, or slices it."""
        items = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(item, (list, bool)) for item in items):
            return None
        if not any(item is Ellipsis for item in items):
            items.append(Ellipsis)
        consumed = sum(_dims(item) for item in items)
        if consumed > len(self.shape):
            return None
        if items[-1] is Ellipsis:
            if consumed < len(self.shape):
                return self._replace(hidden=self.hidden[tuple(items)])
            items.pop()  # it stands for nothing: the last item is the vocabulary's
        if not isinstance(items[-1], slice):
            return None
        if items[-1] == slice(None):
            return self._replace(hidden=self.hidden[tuple(items)])
        return self._slice_classes(items)

    def _slice_classes(self, items: list[Any]) -> Product:
        classes = items[-1]
        steps = tuple((kind, value[classes] if kind == "add" else value) for kind, value in self.steps)
        return self._replace(
            hidden=self.hidden[(*items[:-1], slice(None))],
            weight=self.weight[classes],
            bias=None if self.bias is None else self.bias[classes],
            steps=steps,
        )

    def _reshape(self, sizes: tuple[Any, ...]) -> Product | None:
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        if not sizes or any(isinstance(size, torch.dtype) for size in sizes):
            return None
        V = self.weight.shape[0]
        *lead, last = sizes
        if last == -1:
            last = math.prod(self.shape) // max(1, math.prod(lead))
        if last != V or V == 0:
            return None
        return self._replace(hidden=self.hidden.reshape(*lead, self.hidden.shape[-1]))

    def _permute(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
        ndim = len(self.shape)
        if kwargs or any(not isinstance(a, (int, tuple, list)) for a in args):
            return None
        if name == "permute":
            order = list(args[0]) if isinstance(args[0], (tuple, list)) else list(args)
            order = [d % ndim for d in order]
        else:
            order = list(range(ndim))
            a, b = args
            if not isinstance(a, int) or not isinstance(b, int):
                return None
            a, b = a % ndim, b % ndim
            if name in ("movedim", "moveaxis"):
                order.insert(b, order.pop(a))
            else:
                order[a], order[b] = order[b], order[a]
        if len(order) != ndim:
            return None
        rows = [d for d in order if d != ndim - 1]
        classes_at = order.index(ndim - 1)
        if classes_at not in (1, ndim - 1) or (classes_at == 1 and ndim == 1):
            return None
        return self._replace(hidden=self.hidden.permute(*rows, ndim - 1), classes_second=classes_at == 1 and ndim > 2)

    def _row_operation(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ndim = len(self.shape)
        args, kwargs = list(args), dict(kwargs)  # type: ignore[assignment]
        given = 0
        for position, key in _ROW_OPERATIONS[name]:
            place: Any = args if position < len(args) else kwargs
            at: Any = position if position < len(args) else key
            if at not in kwargs and position >= len(args):
                continue
            dim = place[at]
            if not isinstance(dim, int):
                return None
            dim = dim + ndim + (name == "unsqueeze") if dim < 0 else dim
            if dim >= ndim - (name != "unsqueeze"):
                return None
            place[at] = dim
            given += 1
        if given < len(_ROW_OPERATIONS[name]) and name not in _DEFAULT_DIMS:
            return None
        if ndim < 2:
            return None
        hidden = getattr(self.hidden, name)(*args, **kwargs)
        if isinstance(hidden, Tensor):
            return self._replace(hidden=hidden)
        return [self._replace(hidden=part) for part in hidden]

    def _affine(self) -> tuple[Tensor, Tensor, Tensor | None, float, float | None] | None:
        """(hidden, weight, bias, logit_scale, softcap) with the same logits up to rounding, or None."""
        hidden, bias = self.hidden, self.bias
        scale: float = 1.0
        cap: float | None = None
        for kind, value in self.steps:
            if kind == "tanh":
                if cap is not None:
                    return None
                cap = 1.0
            elif kind in ("mul", "div") and isinstance(value, Tensor):
                if cap is not None:
                    return None
                factor = value if kind == "mul" else 1 / value
                hidden = hidden * factor.to(hidden.dtype)
                bias = None if bias is None else bias * factor.to(bias.dtype)
            elif kind in ("mul", "div"):
                factor = value if kind == "mul" else 1 / value if value else math.nan
                if cap is None:
                    scale *= factor
                elif factor > 0:
                    cap, scale = cap * factor, scale * factor
                else:
                    return None
            elif kind == "add":
                if cap is not None or not scale:
                    return None
                value = value if scale == 1.0 else value / scale
                bias = value if bias is None else bias + value
        if not math.isfinite(scale):
            return None
        return hidden, self.weight, bias, scale, cap

    def cross_entropy(self, target: Tensor, options: dict[str, Any]) -> Any:
        """`fused_linear_cross_entropy` of this product, or None where it cannot express the steps.

        `options` are that function's. The result has the dtype that `F.cross_entropy` of the logits would have.
        """
        affine = self._affine()
        if affine is None or (len(self.shape) > 2 and not self.classes_second):
            return None
        hidden, weight, bias, scale, cap = affine
        if cap is not None and ("softcap" in options or "logit_scale" in options):
            return None
        options = {**options, "softcap": options.get("softcap", cap)}
        options["logit_scale"] = scale * options.get("logit_scale", 1.0)
        is_probs = target.is_floating_point() and target.shape == self.shape
        out_dtype = self.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            out_dtype = torch.float32
        elif is_probs:
            out_dtype = torch.promote_types(out_dtype, target.dtype)
        if is_probs and self.classes_second:
            target = target.movedim(1, -1)
        if bias is not None and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
        # Autocast to the product's dtype keeps a loss from bfloat16 hidden states in float32 until it is cast here.
        with self.autocast(self.linear_dtype in (torch.float16, torch.bfloat16)):
            loss = fused_linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)
        return loss.to(out_dtype)


def _dims(item: Any) -> int:
    """How many dimensions an item of an index consumes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1
