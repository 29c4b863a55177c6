"""`DeferredLogits`, a tensor whose values are not computed until they are read."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from . import expression
from .graph import Connect, Node, Read, check_unchanged, version_of
from .loss import LOSSES
from .names import METADATA, writes
from .origin import Origin, joint
from .product import Product, product_of
from .recording import COMMUTATIVE, record
from .reductions import reduce


class DeferredLogits(Tensor):
    """Logits (..., V) of some hidden states and a head, not computed until they are read.

    Casts, scales, tanh, added biases, operations on rows and slices of the vocabulary are recorded and give
    DeferredLogits again. `F.cross_entropy` of them is `fused_linear_cross_entropy`. Any other operation that reads or
    writes them computes them once, by the original operations in their order and in the grad mode they were made in. It
    then works on the computed tensor, and the gradient flows through that. Once the head or the hidden states have been
    changed in place (by an optimizer's step), reading raises RuntimeError: the logits can no longer be computed.
    """

    takes_losses = True  # read by `eager.overridden`

    _product: Any  # a Product or an Expression
    _versions: list[int]
    _value: Tensor | None
    _with_grad: bool
    _parent: DeferredLogits | None
    _operation: tuple[Any, tuple[Any, ...], dict[str, Any]]
    _children: list[weakref.ref[DeferredLogits]]
    _hooks: list[Any]
    _made_of: tuple[DeferredLogits, ...]
    _node: Any
    _is_contiguous: bool  # what `is_contiguous()` has returned
    _written: bool
    _origin: Origin

    @property
    def is_materialized(self) -> bool:
        """Whether these logits, or others that were made from them or that they were made from, were computed."""
        return self._origin.read

    def materialize(self, reader: str = "materialize") -> Tensor:
        """The logits as a plain tensor, computed on the first call; `reader` is the operation that a report names."""
        if self._value is None:
            parent = self._parent
            self._origin.was_read(reader)
            if self._is_foreign():
                self._value = Read.apply(self)
            elif parent is not None and (parent._value is not None or self._is_expression()):
                func, args, kwargs = self._operation
                with torch.set_grad_enabled(self._with_grad):
                    self._value = func(parent.materialize(reader), *args, **kwargs)
            elif self._is_expression():
                func, args, kwargs = self._operation
                values = [a.materialize(reader) if isinstance(a, DeferredLogits) else a for a in args]
                with torch.set_grad_enabled(self._with_grad), expression.autocast(self._product):
                    self._value = func(*values, **kwargs)
            else:
                product = self._checked_product()
                with torch.set_grad_enabled(self._with_grad):
                    self._value = product.logits()
            if self._is_contiguous:
                self._value = self._value.contiguous()
            for hook in self._hooks:
                self._value.register_hook(hook)
        return self._value

    def _usable_recipe(self) -> Any:
        """The product or expression; None if the logits have been written to since."""
        return None if self._written or self._is_foreign() else self._checked_product()

    def _is_expression(self) -> bool:
        return isinstance(self._product, expression.Expression)

    def _usable_product(self) -> Product | None:
        recipe = self._usable_recipe()
        return recipe if isinstance(recipe, Product) else None

    def _connected(self, value: Tensor) -> Tensor:
        """A value computed without logits, whose backward first calls the logits' hooks. FSDP has such hooks."""
        hooked, members = [], [self]
        for member in members:
            members += [m for m in member._made_of if all(m is not known for known in members)]
            hooked += [member] if member._hooks else []
        return Connect.apply(value, *hooked) if hooked and value.requires_grad else value

    def _is_there(self) -> bool:
        """Whether these logits are a computed tensor, or a part of one."""
        member: DeferredLogits | None = self
        while member is not None and member._value is None:
            member = member._parent
        return member is not None

    def _is_foreign(self) -> bool:
        """Whether an autograd.Function returned this tensor: its gradient is that function's to compute."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not self._node

    def _checked_product(self) -> Any:
        check_unchanged(self._product.tensors, self._versions)
        return self._product

    @torch.compiler.disable  # Dynamo of PyTorch 2.11 loses the fields of a product that leaves a traced frame
    def _record(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The deferred result of an operation; None if the operation cannot be recorded."""
        recipe = self._usable_recipe()
        if recipe is None:
            return None
        with torch.set_grad_enabled(self._with_grad and torch.is_grad_enabled()):
            if name == "clone" and not (self._origin.in_forward or self.requires_grad):
                return None  # a copy of detached logits is made to last; DDP clones others, in no_grad mode
            if self._is_expression():
                done = expression.on_rows(recipe, name, args, kwargs)
            elif name in ("add", "__add__") and len(args) == 1 and isinstance(args[0], DeferredLogits):
                other = args[0]._usable_product()
                done = None if other is None or kwargs else recipe.plus(other)
            else:
                done = record(recipe, name, args, kwargs)
            if isinstance(done, list):
                return tuple(make(p, self, (_part, (func, i, args, kwargs), {})) for i, p in enumerate(done))
            return None if done is None else make(done, self, (func, args, kwargs))

    def _evaluate(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on rows: a deferred expression, or its reduction. None for other operations."""
        deferred = [a for a in args if isinstance(a, DeferredLogits)]
        if any(d._is_there() for d in deferred):
            return None  # the computed tensor is used
        recipes = {id(d): d._usable_recipe() for d in deferred}
        if None in recipes.values():
            return None
        operands = tuple(recipes.get(id(a), a) for a in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(d._with_grad for d in deferred)):
            done = expression.record(func, name, operands, kwargs)
            if done is not None:
                origin = joint([d._origin for d in deferred])
                return make(done, None, (func, args, kwargs), DeferredLogits, origin, tuple(deferred))
            if deferred[0] is not self or len(deferred) > 1 or args[0] is not self:
                return None
            found = reduce(func, name, operands[0], args[1:], kwargs, self._origin)
        return torch.utils._pytree.tree_map_only(Tensor, self._connected, found)

    def _settle(self) -> None:
        """Computes all related logits before one of them is written, so that views share memory as PyTorch's do."""
        root = self
        while root._parent is not None:
            root = root._parent
        family = [root]
        for member in family:
            family += [child for ref in member._children if (child := ref()) is not None]
        if any(m._value is not None and m._parent is not None and m._parent._value is None for m in family):
            raise RuntimeError("logits: written in place after a part of them was read; write to logits.clone()")
        for member in family:
            member.materialize()
            member._written = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        name = func.__self__.__name__ if func.__name__ in ("__get__", "__set__") else func.__name__
        if name in COMMUTATIVE and len(args) == 2 and isinstance(args[1], cls) and not isinstance(args[0], cls):
            args = args[::-1]
        self = args[0] if args and isinstance(args[0], cls) else None
        if func in LOSSES and args and isinstance(args[0], cls):
            return LOSSES[func](*args, **kwargs, origin=args[0]._origin)
        if self is not None:
            if name in METADATA and func.__name__ != "__set__" and not self._written:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name == "is_contiguous" and self._value is None and not (kwargs or args[1:]):
                self._is_contiguous = not self._product.classes_second
                return self._is_contiguous
            if name == "register_hook" and self._value is None:
                return self._register_hook(*args[1:], **kwargs)
            if name in ("retain_grad", "grad", "retains_grad") and self._value is None:
                return self._before_loss(name)
            if not writes(name):
                done = self._record(func, name, args[1:], kwargs)
                if done is None:
                    done = self._evaluate(func, name, args, kwargs)
                if done is not None:
                    return done
            else:
                self._settle()
        elif (other := next((a for a in args if isinstance(a, cls)), None)) is not None:
            done = other._evaluate(func, name, args, kwargs)
            if done is not None:
                return done
        elif "out" in kwargs and isinstance(kwargs["out"], cls):
            kwargs["out"]._settle()
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls,
            lambda t: t.materialize(name) if writes(name) else t._origin.guarded(t.materialize(name)),
            (args, kwargs),
        )
        if self is None:
            return func(*args, **kwargs)
        value, version = args[0], version_of(args[0])
        out = func(*args, **kwargs)
        self._written = self._written or version_of(value) != version
        return self if out is value and self._written else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # static there
        """Computes the logits for code that bypasses __torch_function__ (C++, autograd.Function.apply)."""
        if func is torch.ops.aten.detach.default:
            done = args[0]._record(torch.Tensor.detach, "detach", (), {})
            if done is not None:
                return done
        values = torch.utils._pytree.tree_map_only(
            cls, lambda t: t.materialize(func.__name__).detach(), (args, kwargs or {})
        )
        if func._schema.is_mutable:
            raise RuntimeError(f"logits: {func} would write to deferred logits; pass logits.clone()")
        return func(*values[0], **values[1])

    def _register_hook(self, hook: Any) -> Any:
        """Registers a hook on the tensor's own node, and keeps it for the logits that may be computed later."""
        self._hooks.append(hook)
        with torch._C.DisableTorchFunctionSubclass():
            return super().register_hook(hook)

    def _before_loss(self, name: str) -> Any:
        if self._origin.fused:
            if name == "grad":
                return None
            raise RuntimeError(
                f"logits.{name}: the loss was taken without computing logits, so they get no gradient; call "
                "unpatch_model(model) to have it"
            )
        value = self.materialize(name)
        if name != "retain_grad":
            return getattr(value, name)
        self._written = True  # from now on losses are taken of the tensor, which gets the gradient
        return value.retain_grad()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # has no annotations there
        if self._value is not None:
            return repr(self._value)
        about = f"shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'"
        return f"DeferredLogits({about}; .detach().clone() computes them)"


def make(
    product: Product | expression.Expression,
    parent: DeferredLogits | None = None,
    operation: Any = None,
    cls: type[DeferredLogits] | None = None,
    origin: Origin | None = None,
    made_of: tuple[DeferredLogits, ...] = (),
) -> DeferredLogits:
    """Makes deferred logits, of the class of `parent` unless `cls` is given.

    `parent` is the tensor from which `operation`, (function, arguments, keywords), would have made them.
    """
    made: Any = Node.apply(product, cls or (DeferredLogits if parent is None else type(parent)), *product.tensors)
    made._product = product
    made._versions = [version_of(t) for t in product.tensors]
    made._value = None
    made._with_grad = torch.is_grad_enabled()
    made._parent = parent
    made._made_of = made_of or (() if parent is None else (parent,))
    made._operation = operation
    made._children = []
    made._hooks = []
    with torch._C.DisableTorchFunctionSubclass():
        made._node = made.grad_fn
    made._is_contiguous = False
    made._written = False
    made._origin = origin or (Origin() if parent is None else parent._origin)
    if parent is None:
        made._origin.size += product.bytes if isinstance(product, Product) else 0
    else:
        parent._children.append(weakref.ref(made))
    logits: DeferredLogits = made
    return logits


def defer(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, origin: Origin | None = None) -> DeferredLogits:
    """`F.linear(hidden, weight, bias)`, deferred.

    >>> logits = defer(torch.ones(2, 3), torch.ones(5, 3))
    >>> (logits / 2)[0].is_materialized, logits[0].sum().item(), logits.is_materialized
    (False, 15.0, True)
    """
    return make(product_of(hidden, weight, bias), origin=origin)


def as_tensor(traced: Any, origin: Origin) -> DeferredLogits:
    """Turns traced logits into a tensor once tracing is over."""
    return make(traced._product, origin=origin)


def _part(value: Tensor, func: Any, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    part: Tensor = func(value, *args, **kwargs)[i]
    return part
