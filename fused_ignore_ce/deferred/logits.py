"""`DeferredLogits`, a tensor whose values are not computed until they are read."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import forms, tiles
from .graph import Adopt, Fused, Node, Read, Work, are_saved_tensors_packed, connected, dense_of, unpacked
from .loss import LOSSES
from .names import FACTORIES, MEMORY, NATIVE, ON_SHAPES, writes
from .origin import Origin, joint
from .product import Product, product_of
from .recipe import Recipe, autocast, autocast_state
from .reductions import reduction

_plainly = torch._C.DisableTorchFunctionSubclass


class DeferredLogits(Tensor):
    """Logits (..., V) of some hidden states and a head, not computed until they are read.

    Casts, scales, tanh, added biases, softmaxes, elementwise operations, operations on rows and slices of the
    vocabulary are recorded and give DeferredLogits again. `F.cross_entropy` of them is `fused_linear_cross_entropy`,
    and reductions of the vocabulary are computed a tile of rows at a time. Any other operation computes them once. To
    autograd they are a tensor like any other. Once the head or the hidden states have been changed in place (by an
    optimizer's step), reading raises RuntimeError: the logits can no longer be computed.
    """

    takes_losses = True  # read by `operators.overridden`

    _recipe: Any = None  # None of logits that are there
    _form: Any = None  # a Product or an Expression, of which only shapes are used
    _meta: Tensor  # shape and strides
    _origin: Origin
    _value: Tensor | None = None
    _version_of_value = 0
    _is_written = False  # the value stands for this tensor from now on
    _view_of: Any = None  # the tensor that this one is a view of, and the operation that makes the view
    _views: list[weakref.ref[DeferredLogits]]

    @property
    def is_materialized(self) -> bool:
        """Whether these logits, or others that were made from them or that they were made from, were computed."""
        return self._origin.read

    def materialize(self, reader: str = "materialize") -> Tensor:
        """The logits as a plain tensor, computed on the first call; `reader` is the operation that a report names."""
        if self._value is None:
            if self._view_of is not None and (self._view_of[0]._is_there_or_written() or not _in_order(self._meta)):
                return self._aliased(reader)
            self._origin.was_read(reader)
            self._keep(functools.partial(self._raw, reader))
        assert self._value is not None
        return self._value

    def _keep(self, compute: Callable[[], Tensor]) -> None:
        def fresh() -> Tensor:
            """Values in memory of their own, and no view: PyTorch lets nobody write to a view that a function made."""
            found = compute()
            if not found._is_view():
                return found
            made = found.new_empty(0)
            return made.set_(found.untyped_storage(), found.storage_offset(), found.shape, found.stride())

        requires_grad = self._requires_grad()
        with torch.inference_mode(False), torch.set_grad_enabled(requires_grad):
            self._value = connected(Read, self, fresh) if requires_grad else fresh()
        self._version_of_value = self._value._version

    def _raw(self, reader: str = "backward") -> Tensor:
        """The values, without a graph, as they were when this tensor was made."""
        if self._value is not None and not self._stands_alone():
            return self._value.detach()
        recipe: Recipe = self._recipe
        with torch.no_grad():
            recipe.check_unchanged()
            if isinstance(self._form, Product):
                if not any(t._is_known() for t in recipe.inputs if isinstance(t, DeferredLogits)):
                    form = forms.Leaves().form(self, False)
                    return tiles.all_logits(form, self._origin.settings.options.get("memory_budget"))
            values = []
            for t in recipe.inputs:
                if not isinstance(t, DeferredLogits):
                    values.append(t)
                elif t._stands_alone() or t._is_known():
                    values.append(t._raw(reader))
                else:
                    values.append(t.materialize(reader).detach())
            found = recipe.run(values)
        return found.clone() if any(_shares(found, v) for v in values) else found

    def _is_known(self) -> bool:
        """Whether the values follow from computed ones, without the head's weights."""
        if self._value is not None and not self._stands_alone():
            return True
        above = [t for t in self._recipe.inputs if isinstance(t, DeferredLogits)]
        return bool(above) and all(t._is_known() for t in above)

    def _is_there(self) -> bool:
        """Whether the values are computed, or are a part of computed ones.

        A checkpoint that runs a function again must find what it found the first time: to it, they are not.
        """
        if are_saved_tensors_packed():
            return False
        if self._value is not None or (self._view_of is not None and self._view_of[0]._is_there()):
            return True
        return self._recipe is None or self._is_known()

    def _is_there_or_written(self) -> bool:
        return self._value is not None or self._stands_alone()

    def _stands_alone(self) -> bool:
        """Whether the computed value stands for this tensor: somebody wrote to it, or there is no recipe."""
        if self._is_written or self._recipe is None:
            return True
        if self._value is not None and self._value._version != self._version_of_value:
            return True
        return self._view_of is not None and self._view_of[0]._stands_alone()

    def _aliased(self, reader: str) -> Tensor:
        """The computed tensor, which shares memory with those of the tensors that this one is a view of."""
        if self._view_of is None:
            return self.materialize(reader)
        base, func, args, kwargs, part = self._view_of
        value = base._aliased(reader)
        mine = self._value
        if mine is None or mine.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
            with torch.inference_mode(False), torch.set_grad_enabled(self._requires_grad()):
                mine = func(value, *args, **kwargs)
                self._value = mine = mine if part is None else mine[part]
            self._version_of_value = mine._version
        return mine

    def _can_be_fused(self) -> bool:
        """Whether a gradient of these logits reaches the recipe's inputs, or there is none."""
        if self._stands_alone():
            return False
        return not self._requires_grad() or any(self._recipe.needs)

    def _requires_grad(self) -> bool:
        with _plainly():
            return self.requires_grad

    def _become_leaf(self) -> None:
        """Detached logits that are told to require a gradient: the computed tensor is the leaf."""
        value = self._aliased("requires_grad_")
        value.requires_grad_()
        self._is_written = True
        with torch.enable_grad():
            connected(Adopt, self, value)

    def _family(self) -> list[DeferredLogits]:
        """All tensors that share memory with this one."""
        root = self
        while root._view_of is not None:
            root = root._view_of[0]
        family = [root]
        for member in family:
            family += [view for reference in member._views if (view := reference()) is not None]
        return family

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        name = func.__name__
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__ if name == "__get__" else f"__set__ {func.__self__.__name__}"
        self = args[0] if args and isinstance(args[0], cls) else None
        if self is not None and not self._stands_alone():
            if _asks_for_leaf(name, args, kwargs) and not self._requires_grad():
                self._become_leaf()
                return self
            if name in NATIVE or name in ("__set__ requires_grad", "__set__ grad", "__set__ _backward_hooks"):
                with _plainly():
                    return func(*args, **kwargs)
            if name == "detach":
                return _recorded(func, name, args, kwargs)
            if name == "type" and not args[1:] and not kwargs:
                return torch.empty(0, dtype=self._meta.dtype, device=self.device).type()
        if func in LOSSES and self is not None:
            return LOSSES[func](*args, **kwargs, origin=self._origin)
        if func is torch.autograd.grad or func is torch.autograd.backward:
            return _differentiated(func, args, kwargs)
        if writes(name, kwargs):
            return _written(func, name, args, kwargs)
        deferred = list(_deferred((args, kwargs)))
        if any(t._stands_alone() for t in deferred):
            return _of_values(func, name, args, kwargs, deferred)
        if name in ON_SHAPES:
            return func(*_replaced(args, {id(t): t._meta for t in deferred}), **kwargs)
        if self is not None and name in FACTORIES:
            return func(self._meta, *args[1:], **{"device": self.device, **kwargs})
        if not torch.is_inference_mode_enabled():
            done = _recorded(func, name, args, kwargs) if _RECORDED(name) else None
            if done is None and self is not None:
                done = _reduced(func, name, self, args[1:], kwargs)
            if done is not None:
                return done
        return _of_values(func, name, args, kwargs, deferred)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # static there
        """Computes the logits for code that bypasses __torch_function__ (C++, autograd.Function.apply)."""
        first = args[0] if args else None
        same = func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) or (
            func is torch.ops.aten.view.default and tuple(args[1]) == tuple(args[0].shape)
        )
        if same and isinstance(first, cls) and not first._stands_alone():
            return first._alias()
        values = torch.utils._pytree.tree_map_only(
            cls, lambda t: t.materialize(func.__name__).detach(), (args, kwargs or {})
        )
        if func._schema.is_mutable and isinstance(first, cls):
            raise RuntimeError(f"logits: {func} would write to deferred logits; pass logits.clone()")
        return func(*values[0], **values[1])

    def take_loss(self, lean: Any, dense: Any, operands: list[Tensor]) -> Any:
        """A loss, see the function `take`."""
        if self._origin.settings.keep_logits and self._is_there():
            return None
        return take([self], operands, lean, dense)

    @property
    def classes(self) -> int:
        """The size of the vocabulary's dimension."""
        return int(self.shape[1 if getattr(self._form, "classes_second", False) else -1])

    def _alias(self) -> DeferredLogits:
        return _made(type(self), self._recipe, self._form, self._meta, self._origin, node=False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # has no annotations there
        if self._value is not None:
            return repr(self._value)
        about = f"shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'"
        return f"DeferredLogits({about}; .detach().clone() computes them)"


def _asks_for_leaf(name: str, args: Any, kwargs: Any) -> bool:
    asked = name in ("requires_grad_", "__set__ requires_grad")
    return asked and bool(args[1] if args[1:] else kwargs.get("requires_grad", True))


def _deferred(values: Any) -> Iterator[DeferredLogits]:
    """The deferred logits among arguments."""
    for value in values:
        if isinstance(value, DeferredLogits):
            yield value
        elif type(value) in (tuple, list):
            yield from _deferred(value)
        elif type(value) is dict:
            yield from _deferred(value.values())


def _RECORDED(name: str) -> bool:
    from .expression import ELEMENTWISE, NORMALIZING
    from .recording import RECORDERS

    return name in RECORDERS or name in ELEMENTWISE or name in NORMALIZING


def _made(cls: Any, recipe: Recipe, form: Any, meta: Tensor, origin: Origin, node: bool = True) -> DeferredLogits:
    """Makes deferred logits, with a node in autograd's graph if one of the recipe's inputs needs a gradient."""

    def make() -> Any:
        made = _wrapped(cls, meta, form.device, origin)
        made._recipe, made._form = recipe, form
        return made

    made = connected(Node, recipe, make, *recipe.inputs) if node and any(recipe.needs) else make()
    if node:
        recipe.keep_operands() if recipe.product is None else None
    deferred: DeferredLogits = made
    return deferred


def _wrapped(cls: Any, meta: Tensor, device: torch.device, origin: Origin) -> Any:
    made: Any = Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device)
    made._meta, made._origin, made._views = meta, origin, []
    return made


def _recorded(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The deferred result of an operation; None if the operation is not recorded."""
    operands = list(_deferred(args))
    if not operands or any(not t._can_be_fused() for t in operands) or len(list(_deferred((kwargs,)))):
        return None if name != "detach" else _recorded_detach(func, args[0])
    if name == "detach":
        return _recorded_detach(func, args[0])
    first = operands[0]
    if name == "clone" and not first._requires_grad() and not first._origin.in_forward:
        return None  # a copy of detached logits is made to last
    recipe = Recipe(func, name, args, kwargs)
    values = [t._form if isinstance(t, DeferredLogits) else t.detach() for t in recipe.inputs]
    with torch.no_grad():
        form = forms.applied(recipe, values)
        if form is None or (not _is_affine(form) and any(t._is_there() for t in operands)):
            return None
        try:
            meta = _meta_of(func, name, args, kwargs, form, first)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None  # it is an error for computed logits, too
    if meta is first._meta and args[0] is first:
        return first
    origin = first._origin if len(operands) == 1 else joint([t._origin for t in operands])
    if not isinstance(form, list):
        made = _made(type(first), recipe, form, meta, origin)
        if meta._is_view():
            _is_view(made, first, func, args[1:], kwargs)
        return made
    made = []
    for i, (part, shape) in enumerate(zip(form, meta, strict=True)):
        recipe = Recipe(func, name, args, kwargs, part=i)
        made.append(_made(type(first), recipe, part, shape, origin))
        _is_view(made[-1], first, func, args[1:], kwargs, i)
    return tuple(made)


def _is_affine(form: Any) -> bool:
    return isinstance(form, list) or (isinstance(form, Product) and form.before_log_softmax is None)


def _recorded_detach(func: Any, t: DeferredLogits) -> DeferredLogits:
    with torch.no_grad():
        recipe = Recipe(func, "detach", (t,), {})
        made = _made(type(t), recipe, t._form, t._meta, t._origin)
    _is_view(made, t, func, (), {})
    return made


def _is_view(made: DeferredLogits, base: DeferredLogits, func: Any, args: Any, kwargs: Any, part: Any = None) -> None:
    made._view_of = base, func, args, kwargs, part
    base._views.append(weakref.ref(made))


_STEPS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "tanh",
                    "add", "__add__", "__radd__", "sub", "subtract", "__sub__", "log_softmax", "to", "type_as", "float",
                    "double", "half", "bfloat16"})  # fmt: skip


def _meta_of(func: Any, name: str, args: Any, kwargs: Any, form: Any, first: DeferredLogits) -> Any:
    """Shape and strides of a result: those that the operation gives for a tensor without memory."""
    if isinstance(form, list):
        return list(func(first._meta, *args[1:], **kwargs))
    same_shape = form.shape == first._meta.shape
    if name in ("float", "double", "half", "bfloat16", "to", "type_as") and form.dtype == first._meta.dtype:
        if not (kwargs.get("copy") or (args[2:] and args[-1] is True)):
            return first._meta
    if same_shape and (name in _STEPS or not isinstance(form, Product)):
        if first._meta.is_contiguous():
            return torch.empty(form.shape, dtype=form.dtype, device="meta")
        return torch.empty_strided(form.shape, (first._meta * 1).stride(), dtype=form.dtype, device="meta")
    if any(isinstance(t, Tensor) for t in _flat(args[1:])) or name == "index_select":
        return torch.empty(form.shape, dtype=form.dtype, device="meta")
    return func(first._meta, *args[1:], **kwargs)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if type(value) in (tuple, list):
            yield from _flat(value)
        else:
            yield value


def _reduced(func: Any, name: str, t: DeferredLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that reduces the vocabulary, computed by tiles; None for other operations."""
    work = reduction(func, name, t._form, args, kwargs)
    if work is None or t._is_there():
        return None
    origin = t._origin
    found = take([t], [], lambda form: work.of(form, origin), work.dense)
    if found is None:
        return None
    product = next(_products(t._form))
    from .expression import describe

    origin.took(f"{name}({describe(t._form)})", product.rows)
    for value in found if isinstance(found, tuple) else (found,):
        origin.guard(value)
    return getattr(torch.return_types, name)(found) if isinstance(found, tuple) else found


def _products(form: Any) -> Iterator[Product]:
    from .expression import _products as of

    return of(form)


def take(inputs: list[DeferredLogits], operands: list[Tensor], lean: Any, dense: Any) -> Any:
    """`dense(*values of inputs, *operands)`, computed by `lean(*forms of inputs, *operands)`; None if that gives None.

    It runs in a call of the head's module, so that whoever gathers its weights around calls has them there.
    """
    if not all(t._can_be_fused() for t in inputs):
        return None
    with _plainly():
        needs = [torch.is_grad_enabled() and t.requires_grad for t in (*inputs, *operands)]
    state = autocast_state(inputs[0]._form.device.type)

    def as_called(*values: Tensor) -> Any:
        with autocast(state):
            return dense(*values)

    def compute() -> Any:
        leaves = forms.Leaves()
        detached = [t.detach().requires_grad_(n) for t, n in zip(operands, needs[len(inputs) :], strict=True)]
        with torch.set_grad_enabled(any(needs)), _plainly(), unpacked():
            found = [leaves.form(t, n) for t, n in zip(inputs, needs, strict=False)]
            result = None if any(form is None for form in found) else lean(*found, *detached)
        if result is None or not any(needs):
            return result
        results, spec = torch.utils._pytree.tree_flatten(result)
        work = Work(results, leaves.found, detached, inputs, needs, as_called)
        made = connected(Fused, work, *inputs, *operands)
        return torch.utils._pytree.tree_unflatten(made, spec)

    root = _root(inputs[0]._recipe)
    if root.head is None:
        return compute()
    return root.head(root.inputs[0], InHead(compute))


class InHead:
    """What a head computes in place of its logits, when it is called with this as its second argument."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute


def _root(recipe: Recipe) -> Recipe:
    while recipe.product is None:
        recipe = next(t for t in recipe.inputs if isinstance(t, DeferredLogits))._recipe
    return recipe


def _differentiated(func: Any, args: Any, kwargs: Any) -> Any:
    """torch.autograd.grad or backward; the gradients that it returns are computed."""
    args, kwargs = torch.utils._pytree.tree_map_only(
        DeferredLogits, lambda t: t._aliased(func.__name__) if t._stands_alone() else t, (args, kwargs)
    )
    with _plainly():
        found = func(*args, **kwargs)
    return found if found is None else tuple(dense_of(g) for g in found)


def _of_values(func: Any, name: str, args: Any, kwargs: Any, deferred: list[DeferredLogits]) -> Any:
    """The result of an operation on the computed logits."""
    is_metadata = name in NATIVE

    def value(t: DeferredLogits) -> Tensor:
        found = t._aliased(name) if t._stands_alone() or name in MEMORY else t.materialize(name)
        return found

    values = {id(t): value(t) for t in deferred}
    first = args[0] if args else None
    if is_metadata and isinstance(first, DeferredLogits):
        found = func(values[id(first)], *_replaced(args[1:], values), **_replaced(kwargs, values))
        if name == "grad" and found is None:
            with _plainly():
                found = func(*args, **kwargs)
        return found
    out = func(*_replaced(args, values), **_replaced(kwargs, values))
    if any(_shares(o, values[id(t)]) for t in deferred if t._view_of is not None for o in _flat([out])):
        values = {id(t): t._aliased(name) for t in deferred}
        out = func(*_replaced(args, values), **_replaced(kwargs, values))
    for t in deferred:
        if out is values[id(t)]:
            return t
    origin = next((t._origin for t in deferred if t._origin.changes), None)
    return out if origin is None else torch.utils._pytree.tree_map_only(Tensor, lambda t: _with_options(t, origin), out)


def _with_options(value: Tensor, origin: Origin) -> Tensor:
    """A tensor that was made of the logits, for code whose loss the options have to reach.

    If it may be logits itself, it still takes losses. Else, a gradient that arrives at it is an error.
    """
    if not value.is_floating_point() or type(value) is not Tensor:
        return value
    if origin.classes not in value.shape:
        origin.guard(value)
        return value
    made = connected(Adopt, _wrapped(DeferredLogits, value, value.device, origin), value)
    made._value, made._is_written = value, True
    deferred: DeferredLogits = made
    return deferred


def _in_order(t: Tensor) -> bool:
    """Whether strides do not grow from one dimension to the next, as those of a computed part of the logits."""
    return sorted(t.stride(), reverse=True) == list(t.stride())


def _shares(out: Any, value: Tensor) -> bool:
    return isinstance(out, Tensor) and out.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()


def _replaced(values: Any, by: dict[int, Tensor]) -> Any:
    if isinstance(values, DeferredLogits):
        return by[id(values)]
    if type(values) in (tuple, list):
        return type(values)([_replaced(v, by) for v in values])
    if type(values) is dict:
        return {k: _replaced(v, by) for k, v in values.items()}
    return values


def _written(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Writes to the computed logits, which stand for the deferred ones from then on, as do their views."""
    deferred = list(_deferred((args, kwargs)))
    values = {id(t): t._aliased(name) for t in deferred}
    target = kwargs.get("out") if isinstance(kwargs.get("out"), DeferredLogits) else args[0]
    out = func(*_replaced(args, values), **_replaced(kwargs, values))
    was_enabled = torch.is_grad_enabled()
    if isinstance(target, DeferredLogits):
        written = values[id(target)]
        for member in target._family():
            value = member._aliased(name)
            member._is_written = True
            with _plainly(), torch.enable_grad():
                if member._view_of is not None and member._view_of[4] is not None:
                    continue  # one of several results: PyTorch lets nobody touch it once its base was written to
                if (was_enabled or member._requires_grad()) and value.requires_grad and _shares(value, written):
                    connected(Adopt, member, value)
                    if member.retains_grad and not value.retains_grad:
                        value.retain_grad()
    for t in deferred:
        if out is values[id(t)]:
            return t
    return out


def defer(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, origin: Origin | None = None, head: Any = None
) -> DeferredLogits:
    """`F.linear(hidden, weight, bias)`, deferred; `head` is the module in whose call this is.

    >>> logits = defer(torch.ones(2, 3), torch.ones(5, 3))
    >>> (logits / 2)[0].is_materialized, logits[0].sum().item(), logits.is_materialized
    (False, 15.0, True)
    """
    return deferred_product(product_of(hidden, weight, bias), origin, head)


def deferred_product(
    product: Product, origin: Origin | None = None, head: Any = None, cls: Any = DeferredLogits
) -> DeferredLogits:
    """The logits of a product, deferred. Operations on them see its shapes, not its weights, which may be gathered."""
    origin = origin or Origin()
    recipe = Recipe.root(product, head)
    shapes = [t if i == 0 or type(t) not in (Tensor, torch.nn.Parameter) else _shape_of(t)
              for i, t in enumerate(product.tensors)]  # fmt: skip
    form = product.with_tensors([shapes[0].detach(), *shapes[1:]])
    meta = torch.empty(product.shape, dtype=product.dtype, device="meta")
    made = _made(cls, recipe, form, meta, origin)
    origin.deferred = True
    origin.classes = product.weight.shape[0]
    origin.size += product.bytes
    if origin.settings.keep_logits:
        _keep_until_step(made)
    return made


def _shape_of(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def relaid(
    t: DeferredLogits, func: Any, layout: str, args: tuple[Any, ...], kwargs: dict[str, Any], cls: Any
) -> DeferredLogits:
    """Deferred logits of a sharded head in another layout over the ranks."""
    recipe = Recipe(func, f"layout {layout}", args, kwargs)
    return _made(cls, recipe, t._form._replace(layout=layout), t._meta, t._origin)


def as_tensor(traced: Any, origin: Origin) -> DeferredLogits:
    """Turns traced logits into a tensor once tracing is over."""
    return deferred_product(traced._form, origin)


#: The heads' logits that are alive, of models that were told to keep them, by the serials of their recipes.
_kept: weakref.WeakValueDictionary[int, DeferredLogits] = weakref.WeakValueDictionary()


def _keep_until_step(logits: DeferredLogits) -> None:
    """Lets logits that are alive when an optimizer steps be computed before it does."""
    if not _kept:
        _watch_optimizers()
    _kept[logits._recipe.serial] = logits


@functools.cache
def _watch_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def compute(*_: Any) -> None:
        for logits in list(_kept.values()):
            logits.materialize("optimizer.step")
        _kept.clear()

    register_optimizer_step_pre_hook(compute)
