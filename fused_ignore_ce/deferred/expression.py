"""`Expression`: operations on the elements and rows of logits, as a tree whose leaves are products.

An expression and its products have one shape (..., V), so that it can be evaluated for a few rows at a time, which
`tiles.py` does. In it, the classes are last, also where the tensor of logits has them second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..core.eager import autocasts
from .operations import NORMALIZING
from .product import Product
from .recipe import autocast


class Expression(NamedTuple):
    """A recorded call `func(*args, **kwargs)`, whose logits are products or other expressions.

    A tensor among the arguments has one dimension or none if it is the same for all rows; else it has the rows'
    dimensions and a last one. An argument that names a dimension is -1.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype  # of the logits
    product: Product  # the first that it is made of
    autocast: tuple[str, torch.dtype | None]  # when it was recorded

    @property
    def shape(self) -> torch.Size:
        return self.product.shape

    @property
    def classes_second(self) -> bool:
        return self.product.classes_second

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it depends on, each once."""
        return list({id(t): t for t, _ in leaves(self)}.values())

    def with_tensors(self, tensors: list[Tensor]) -> Expression:
        """The same expression of other tensors, in the order of `tensors`."""
        found: Expression = substitute(self, {id(old): new for old, new in zip(self.tensors, tensors, strict=True)})
        return found

    def logits(self) -> Tensor:
        """The value for all rows at once, with the classes last."""
        value: Tensor = evaluate(self, {})
        return value


Form = Product | Expression


def is_form(value: Any) -> bool:
    return isinstance(value, (Product, Expression))


def elementwise(func: Any, name: str, args: Any, kwargs: dict[str, Any], state: Any, dtype: Any) -> Any:
    """The expression of an elementwise operation on forms and tensors; None if it changes the shape."""
    first = next((a for a in args if is_form(a)), None)
    if first is None or not all(type(value) in _CONSTANTS for value in kwargs.values()):
        return None
    if name == "kl_div":
        old = [*args[2:4], kwargs.get("size_average"), kwargs.get("reduce")]  # deprecated; they win over `reduction`
        if kwargs.get("reduction") != "none" or any(a is not None for a in old):
            return None
    operands = tuple([a if a is first or type(a) in _CONSTANTS else _operand(a, first) for a in args])
    if any(a is _NOT for a in operands):
        return None
    dtype = dtype or _dtype_of(func, operands, kwargs)
    return Expression(func, name.strip("_"), operands, kwargs, dtype, first.product, state)


def normalized(func: Any, name: str, args: Any, kwargs: dict[str, Any], state: Any, dtype: Any) -> Any:
    """The expression of softmax or log_softmax; None if it is over something else than the vocabulary."""
    form, *rest = args
    kwargs = {k: v for k, v in kwargs.items() if k != "_stacklevel"}
    dim = rest[0] if rest else kwargs.pop("dim", None)
    given = next((a for a in rest[1:] if isinstance(a, torch.dtype)), None) or kwargs.pop("dtype", None)
    if kwargs or not is_of_classes(form, dim):
        return None
    kwargs = {} if given is None else {"dtype": given}
    dtype = dtype or given or _dtype_of(func, (form, -1), kwargs)
    return Expression(func, name, (form, -1), kwargs, dtype, form.product, state)


def _dtype_of(func: Any, operands: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype of a result, under autocast as it is here.

    Numbers do not promote logits. Otherwise the operation tells it for tensors without elements, not for tensors on the
    meta device, whose kernels of arithmetic are Python and take 80 to 900 us.
    """
    first = next(a for a in operands if is_form(a))
    if not autocasts(first.product.hidden.device) and all(a is first or type(a) in _CONSTANTS for a in operands):
        return cast(torch.dtype, first.dtype)
    dtype: torch.dtype = func(*[_without_elements(a) for a in operands], **kwargs).dtype
    return dtype


def _without_elements(value: Any) -> Any:
    if is_form(value):
        return torch.empty(0, dtype=value.dtype, device=value.product.hidden.device)
    return value.new_empty(0) if isinstance(value, Tensor) and value.dim() else value


_CONSTANTS = (int, float, bool, str, type(None), torch.dtype)
_NOT = object()


def _operand(value: Any, first: Form) -> Any:
    """An argument as an expression keeps it; `_NOT` if it cannot."""
    shape, hidden = first.shape, first.product.hidden
    if is_form(value):
        return value if value.shape == shape and value.classes_second == first.classes_second else _NOT
    if type(value) not in (Tensor, torch.nn.Parameter):
        return _NOT
    if value.dim() == 0:
        return value
    if value.device != hidden.device or value.dim() > len(shape):
        return _NOT
    if first.classes_second:
        value = value[(None,) * (len(shape) - value.dim())].movedim(1, -1)
    lead, V, last = hidden.shape[:-1], first.product.weight.shape[0], value.shape[-1]
    if last not in (1, V):
        return _NOT
    if value.numel() == last:  # the same for all rows
        return value.reshape(last)
    try:
        return value.expand(*lead, last)
    except RuntimeError:  # it would make the result larger
        return _NOT


def is_of_classes(form: Form, dim: Any) -> bool:
    """Whether a dimension of the logits is that of the classes."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    ndim = form.product.hidden.dim()
    return isinstance(dim, int) and not isinstance(dim, bool) and dim % ndim == (1 if form.classes_second else ndim - 1)


def log_softmax_of(form: Any) -> Any:
    """The form whose log-probabilities these are; None if they are none, or float64, which no linear loss is."""
    is_one = isinstance(form, Expression) and form.name == "log_softmax"
    return form.args[0] if is_one and form.kwargs.get("dtype") != torch.float64 else None


def products_of(form: Any) -> Iterator[Product]:
    """The products of a form; one that occurs twice, twice."""
    if isinstance(form, Product):
        yield form
    elif isinstance(form, Expression):
        for a in form.args:
            yield from products_of(a)


def is_chain(form: Form) -> bool:
    """Whether a form comes from one product, by operations one after another."""
    return sum(1 for _ in products_of(form)) == 1


def operands_of(form: Any) -> Iterator[Tensor]:
    """The tensors of a form that are in no product."""
    if isinstance(form, Expression):
        for a in form.args:
            yield from operands_of(a)
    elif isinstance(form, Tensor):
        yield form


def leaves(form: Any) -> Iterator[tuple[Tensor, bool]]:
    """The tensors that a form depends on, and whether each has a part for every row."""
    for p in products_of(form):
        yield p.hidden, True
        yield from ((t, False) for t in p.tensors[1:])
    yield from ((t, t.dim() > 1) for t in operands_of(form))


def is_normalized(form: Any) -> bool:
    """Whether softmax or log_softmax is anywhere in a form, so that each class depends on the others."""
    return isinstance(form, Expression) and (form.name in NORMALIZING or any(map(is_normalized, form.args)))


def substitute(form: Any, tensors: dict[int, Tensor], classes_second: bool | None = None, done: Any = None) -> Any:
    """The same form with other tensors, by the `id` of those that they replace. What is shared stays shared."""
    done = {} if done is None else done
    found = done.get(id(form))
    if found is not None:
        return found
    get = tensors.get
    if isinstance(form, Product):
        h, w, b, dtype, second, layout = form
        second = second if classes_second is None else classes_second
        found = Product(get(id(h), h), get(id(w), w), b if b is None else get(id(b), b), dtype, second, layout)
    else:
        args = [a if type(a) in _CONSTANTS else get(id(a), a) if isinstance(a, Tensor)
                else substitute(a, tensors, classes_second, done) for a in form.args]  # fmt: skip
        found = form._replace(args=tuple(args), product=done[id(form.product)])
    done[id(form)] = found
    return found


def evaluate(form: Any, known: dict[int, Any]) -> Any:
    """The value of a form, with the classes last; `known` holds what was computed, so that nothing is twice."""
    if not is_form(form):
        return form
    if id(form) not in known:
        if isinstance(form, Product):
            known[id(form)] = form.logits()
        else:
            args = [evaluate(a, known) for a in form.args]
            with autocast(form.autocast):
                known[id(form)] = form.func(*args, **form.kwargs)
    return known[id(form)]
