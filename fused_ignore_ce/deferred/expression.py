"""Operations on rows of logits, recorded as an expression. Nothing has the size of the logits until it is evaluated.

Elementwise operations, softmax and log_softmax keep the shape (..., V) of the logits and of each other. An expression
can therefore be evaluated for a few rows at a time, which `tiles.py` does once an operation reduces the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .product import Product
from .recipe import autocast, autocast_state
from .recording import record as record_on_product

#: Names of operations on elements, whose tensors broadcast against the logits.
ELEMENTWISE = frozenset({
    "neg", "negative", "__neg__", "exp", "exp2", "expm1", "log", "log2", "log1p", "square", "sqrt", "rsqrt", "abs",
    "sigmoid", "tanh", "sin", "relu", "reciprocal", "clamp", "clamp_min", "clamp_max", "nan_to_num", "xlogy",
    "add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__", "rsub", "mul", "multiply", "__mul__",
    "__rmul__", "div", "divide", "true_divide", "__truediv__", "__rtruediv__", "pow", "__pow__", "masked_fill",
    "float", "double", "half", "bfloat16", "to",
})  # fmt: skip
#: Operations on whole rows that keep their shape; the dimension is the first argument.
NORMALIZING = frozenset({"softmax", "log_softmax"})
_UNCHANGED = ("clone", "contiguous")
_CASTS = ("float", "double", "half", "bfloat16", "to")


class Expression(NamedTuple):
    """A recorded call `func(*args, **kwargs)`, whose logits are products or other expressions.

    A tensor among the arguments has one dimension or none if it is the same for all rows; else it has the rows'
    dimensions and a last one. An argument that names a dimension is -1.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size
    dtype: torch.dtype
    autocast: tuple[str, torch.dtype | None]  # when it was recorded

    @property
    def classes_second(self) -> bool:
        return False

    @property
    def product(self) -> Product:
        """The first product that it is made of."""
        return next(p for p in products_of(self))

    @property
    def device(self) -> torch.device:
        return self.product.device

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it depends on, each once."""
        return list({id(t): t for t, _ in leaves(self)}.values())

    def with_tensors(self, tensors: list[Tensor]) -> Expression:
        replaced = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        expression: Expression = substitute(self, replaced)
        return expression

    def logits(self) -> Tensor:
        """The value of the expression for all rows at once."""
        value: Tensor = evaluate(self, {})
        return value


def record(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> Expression | None:
    """The expression that an operation on products, expressions and tensors gives; None where it is not recorded."""
    first = next((a for a in args if isinstance(a, (Product, Expression))), None)
    if first is None or not can_record(first):
        return None
    if name in NORMALIZING:
        normalized = _normalized(first, args[1:], kwargs) if args[0] is first else None
        return None if normalized is None else made(func, name, (first, -1), normalized, state)
    if name not in ELEMENTWISE or not all(_is_constant(value) for value in kwargs.values()):
        return None
    if name in _CASTS and not all(isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values())):
        return None
    operands = [_operand(a, first) for a in args]
    return None if any(a is _NOT for a in operands) else made(func, name, tuple(operands), kwargs, state)


def can_record(recipe: Product | Expression) -> bool:
    """Whether operations on these logits are recorded: their rows are those of the hidden states, and V is above 1."""
    products = list(products_of(recipe))
    return (
        len(recipe.shape) > 1
        and recipe.shape[-1] > 1
        and all(p.layout == "plain" and not p.classes_second for p in products)
    )


def made(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any = None) -> Expression:
    """Builds an expression with the shape of its logits and the dtype that the operation returns."""
    first = next(a for a in args if isinstance(a, (Product, Expression)))
    device = first.device
    state = state or autocast_state(device.type)
    with torch.no_grad(), autocast(state):
        empty = func(*(_empty(a, device) for a in args), **kwargs)
    dtype = empty.dtype if isinstance(empty, Tensor) else empty[0].dtype
    return Expression(func, name.strip("_"), args, kwargs, first.shape, dtype, state)


def _empty(operand: Any, device: torch.device) -> Any:
    """An operand with no rows, from which PyTorch tells the dtype of a result without computing one."""
    if isinstance(operand, (Product, Expression)):
        return torch.empty(0, operand.shape[-1], dtype=operand.dtype, device=device)
    if isinstance(operand, Tensor) and operand.dim() > 1:
        return operand.detach().reshape(-1, operand.shape[-1])[:0]
    return operand


_NOT = object()


def _operand(value: Any, first: Product | Expression) -> Any:
    """An argument as an expression keeps it; `_NOT` if it cannot."""
    if isinstance(value, (Product, Expression)):
        return value if value.shape == first.shape and can_record(value) else _NOT
    if not isinstance(value, Tensor):
        return value if _is_constant(value) else _NOT
    lead, V = first.shape[:-1], first.shape[-1]
    if type(value) not in (Tensor, torch.nn.Parameter) or (value.device != first.device and value.dim() > 0):
        return _NOT
    if value.dim() > len(first.shape) or value.shape[-1:] not in ((), (1,), (V,)):
        return _NOT
    if value.numel() == 1 or value.numel() == value.shape[-1]:  # the same for all rows
        return value.reshape(value.shape[-1:]) if value.dim() > 0 else value
    try:
        return value.expand(*lead, value.shape[-1])
    except RuntimeError:  # it would make the result larger
        return _NOT


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str, torch.dtype))


def last_dim(recipe: Product | Expression, dim: Any) -> bool:
    """Whether a dimension is the vocabulary's."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim % len(recipe.shape) == len(recipe.shape) - 1


def _normalized(recipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The keywords of a softmax over the vocabulary, None if it is over something else."""
    kwargs = {k: v for k, v in kwargs.items() if k != "_stacklevel"}
    dims, dtypes = list(args[:1]), [a for a in args[1:] if isinstance(a, torch.dtype)]
    dim = dims[0] if dims else kwargs.pop("dim", None)
    dtype = dtypes[0] if dtypes else kwargs.pop("dtype", None)
    if kwargs or not last_dim(recipe, dim):
        return None
    return {} if dtype is None else {"dtype": dtype}


def on_rows(expression: Expression, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expression | None:
    """Applies an operation on rows to the rows of the logits; None if another tensor of the expression has rows too."""
    if name in _UNCHANGED and not args and not kwargs:
        return expression
    if name == "detach":
        return expression.with_tensors([t.detach() for t in expression.tensors])
    if name in ELEMENTWISE or name in NORMALIZING:
        return None
    if any(t.dim() > 1 for t in _operands(expression)):
        return None
    hidden: dict[int, Tensor] = {}
    for p in products_of(expression):
        done = record_on_product(p, name, args, kwargs)
        if not isinstance(done, Product) or done.weight is not p.weight or done.classes_second or len(done.shape) < 2:
            return None
        hidden.setdefault(id(p.hidden), done.hidden)
    changed: Expression = substitute(expression, hidden)
    return changed


def products_of(recipe: Any) -> Iterator[Product]:
    if isinstance(recipe, Product):
        yield recipe
    elif isinstance(recipe, Expression):
        for a in recipe.args:
            yield from products_of(a)


def _operands(recipe: Any) -> Iterator[Tensor]:
    if isinstance(recipe, Expression):
        for a in recipe.args:
            yield from _operands(a)
    elif isinstance(recipe, Tensor):
        yield recipe


def leaves(recipe: Any) -> Iterator[tuple[Tensor, bool]]:
    """The tensors that a recipe depends on, and whether each has a part for every row."""
    for p in products_of(recipe):
        yield p.hidden, True
        yield from ((t, False) for t in p.tensors[1:])
    yield from ((t, t.dim() > 1) for t in _operands(recipe))


def substitute(recipe: Any, tensors: dict[int, Tensor]) -> Any:
    """The same recipe with other tensors, by the `id` of those that they replace. Shapes follow from the logits."""
    if isinstance(recipe, Product):
        return recipe.with_tensors([tensors.get(id(t), t) for t in recipe.tensors])
    if isinstance(recipe, Expression):
        args = tuple(substitute(a, tensors) for a in recipe.args)
        shape = next(a.shape for a in args if isinstance(a, (Product, Expression)))
        return recipe._replace(args=args, shape=shape)
    return tensors.get(id(recipe), recipe) if isinstance(recipe, Tensor) else recipe


def evaluate(recipe: Any, known: dict[Any, Any]) -> Any:
    """The value of a recipe; `known` holds what was computed, so that nothing is computed twice."""
    if isinstance(recipe, Product):
        before, key = recipe.before_log_softmax, recipe.key
        if key not in known:
            known[key] = recipe.logits() if before is None else evaluate(before, known).log_softmax(-1)
        return known[key]
    if not isinstance(recipe, Expression):
        return recipe
    args = [evaluate(a, known) for a in recipe.args]
    with autocast(recipe.autocast):
        return recipe.func(*args, **recipe.kwargs)


def describe(recipe: Any) -> str:
    """The expression as a report shows it, such as "log_softmax(logits)"."""
    if isinstance(recipe, Product):
        return "logits" if recipe.before_log_softmax is None else "log_softmax(logits)"
    parts = (describe(a) for a in recipe.args if isinstance(a, (Product, Expression)))
    return f"{recipe.name}({', '.join(parts)})"
