"""`DeferredLogits`, the tensor that is a product until somebody reads it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .loss import LOSSES
from .product import Product
from .recording import COMMUTATIVE, record

#: What the tensor answers itself, by the names of methods and attributes.
_METADATA = frozenset({
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "dtype", "device", "layout",
    "requires_grad", "is_leaf", "grad_fn", "get_device", "is_floating_point", "is_complex", "element_size", "itemsize",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps",
    "is_inference", "is_neg", "is_conj", "output_nr", "name", "names", "_version", "_backward_hooks", "_base",
    "_is_view", "is_sparse_csr", "nbytes",
})  # fmt: skip


class DeferredLogits(Tensor):
    """Logits (..., V) of some hidden states and a head, not computed until they are read.

    Casts, scales, tanh, added biases, operations on rows and slices of the vocabulary are recorded and give
    DeferredLogits again. `F.cross_entropy` of them is `fused_linear_cross_entropy`. Whatever else reads or writes
    them computes them once, as the original operations in their order, in the grad mode they were made in, and goes on
    with the tensor; the gradient then flows through it. Once the head or the hidden states have been changed in place
    (by an optimizer's step) reading raises RuntimeError: the logits of the forward cannot be had any more.
    """

    _product: Product
    _versions: list[int]
    _value: Tensor | None
    _with_grad: bool
    _parent: DeferredLogits | None
    _operation: tuple[Any, tuple[Any, ...], dict[str, Any]]
    _children: list[weakref.ref[DeferredLogits]]
    _hooks: list[Any]
    _node: Any
    _is_contiguous: bool  # as somebody was told
    _written: bool
    _loss_taken: bool

    @property
    def is_materialized(self) -> bool:
        """Whether the logits were computed."""
        return self._value is not None

    def materialize(self) -> Tensor:
        """The logits as a plain tensor, computed on the first call."""
        if self._value is None:
            parent = self._parent
            if self._is_foreign():
                self._value = _Read.apply(self)
            elif parent is not None and parent._value is not None:
                func, args, kwargs = self._operation
                with torch.set_grad_enabled(self._with_grad):
                    self._value = func(parent._value, *args, **kwargs)
            else:
                product = self._checked_product()
                with torch.set_grad_enabled(self._with_grad):
                    self._value = product.logits()
            if self._is_contiguous:
                self._value = self._value.contiguous()
            for hook in self._hooks:
                self._value.register_hook(hook)
        return self._value

    def _usable_product(self) -> Product | None:
        """The product, unless the logits have become something else since."""
        return None if self._written or self._is_foreign() else self._checked_product()

    def _take_loss(self) -> None:
        """From now on no gradient flows through the logits of this family."""
        member: DeferredLogits | None = self
        while member is not None:
            member._loss_taken = True
            member = member._parent

    def _is_foreign(self) -> bool:
        """Whether an autograd.Function returned this tensor: its gradient is that function's to compute."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not self._node

    def _checked_product(self) -> Product:
        for t, version in zip(self._product.tensors, self._versions, strict=True):
            if _version(t) != version:
                raise RuntimeError(
                    "logits: the head's weights or the hidden states were changed in place since the forward, so its "
                    "logits cannot be computed any more; read outputs.logits before optimizer.step(), or call "
                    "unpatch_model(model) to have them always"
                )
            if t.numel() and _is_plain(t) and t.untyped_storage().size() == 0:
                raise RuntimeError(
                    "logits: the head's weights were freed after its forward and before the loss, as a sharding "
                    "wrapper of the head alone does; let the head be part of the root's shard group (with FSDP2, "
                    "no fully_shard(model.lm_head), or reshard_after_forward=False there), or call unpatch_model(model)"
                )
        return self._product

    @torch.compiler.disable  # Dynamo of PyTorch 2.11 loses the fields of a product that leaves a traced frame
    def _record(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation gives, deferred; None where it cannot be recorded."""
        product = self._usable_product()
        if product is None:
            return None
        with torch.set_grad_enabled(self._with_grad and torch.is_grad_enabled()):
            if name in ("add", "__add__") and len(args) == 1 and isinstance(args[0], DeferredLogits):
                other = args[0]._usable_product()
                done = None if other is None or kwargs else product.plus(other)
            else:
                done = record(product, name, args, kwargs)
            if isinstance(done, list):
                return tuple(make(p, self, (_part, (func, i, args, kwargs), {})) for i, p in enumerate(done))
            return None if done is None else make(done, self, (func, args, kwargs))

    def _settle(self) -> None:
        """Computes the whole family, that the memory they share is shared, before one of them is written."""
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
        name = func.__self__.__name__ if func.__name__ in ("__get__", "__set__") else func.__name__
        if name in COMMUTATIVE and len(args) == 2 and isinstance(args[1], cls) and not isinstance(args[0], cls):
            args = args[::-1]
        self = args[0] if args and isinstance(args[0], cls) else None
        if func in LOSSES and args and isinstance(args[0], cls):
            return LOSSES[func](*args, **kwargs)
        if self is not None:
            if name in _METADATA and func.__name__ != "__set__" and not self._written:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name == "is_contiguous" and self._value is None and not (kwargs or args[1:]):
                self._is_contiguous = not self._product.classes_second
                return self._is_contiguous
            if name == "register_hook" and self._value is None:
                return self._register_hook(*args[1:], **kwargs)
            if name in ("retain_grad", "grad", "retains_grad") and self._value is None:
                return self._before_loss(name)
            if not _writes(name):
                done = self._record(func, name, args[1:], kwargs)
                if done is not None:
                    return done
            else:
                self._settle()
        elif "out" in kwargs and isinstance(kwargs["out"], cls):
            kwargs["out"]._settle()
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.materialize(), (args, kwargs))
        if self is None:
            return func(*args, **kwargs)
        value, version = args[0], _version(args[0])
        out = func(*args, **kwargs)
        self._written = self._written or _version(value) != version
        return self if out is value and self._written else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Code that goes past __torch_function__ (C++, autograd.Function.apply) reads the logits here."""
        if func is torch.ops.aten.detach.default:
            return args[0]._record(torch.Tensor.detach, "detach", (), {})
        values = torch.utils._pytree.tree_map_only(cls, lambda t: t.materialize().detach(), (args, kwargs or {}))
        if func._schema.is_mutable:
            raise RuntimeError(f"logits: {func} would write to deferred logits; pass logits.clone()")
        return func(*values[0], **values[1])

    def _register_hook(self, hook: Any) -> Any:
        """On the tensor's own node, for code that goes past __torch_function__, and on the logits once computed."""
        self._hooks.append(hook)
        with torch._C.DisableTorchFunctionSubclass():
            return super().register_hook(hook)

    def _before_loss(self, name: str) -> Any:
        if self._loss_taken:
            if name == "grad":
                return None
            raise RuntimeError(
                f"logits.{name}: the loss was taken without computing logits, so they get no gradient; call "
                "unpatch_model(model) to have it"
            )
        value = self.materialize()
        return getattr(value, name)() if name == "retain_grad" else getattr(value, name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._value is not None:
            return repr(self._value)
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


class _Node(torch.autograd.Function):
    """Makes deferred logits a part of the autograd graph, whoever uses them; its backward computes them again."""

    @staticmethod
    def forward(ctx: Any, product: Product, cls: type[DeferredLogits], *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.product = product.with_tensors([t.detach() for t in tensors])
        return torch.Tensor._make_wrapper_subclass(
            cls, product.shape, dtype=product.dtype, device=product.hidden.device
        )

    @staticmethod
    def backward(ctx: Any, dlogits: Any) -> Any:
        if dlogits is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[2:]
        tensors = [t.detach().requires_grad_(n) for t, n in zip(ctx.product.tensors, needed, strict=True)]
        with torch.enable_grad():
            logits = ctx.product.with_tensors(tensors).logits()
        grads = iter(torch.autograd.grad(logits, [t for t in tensors if t.requires_grad], dlogits, allow_unused=True))
        return None, None, *(next(grads) if n else None for n in needed)


class _Read(torch.autograd.Function):
    """The logits of a tensor that another autograd.Function returned; their gradient goes to that function."""

    @staticmethod
    def forward(ctx: Any, deferred: DeferredLogits) -> Tensor:
        return deferred._checked_product().logits()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        return dlogits


def make(
    product: Product,
    parent: DeferredLogits | None = None,
    operation: Any = None,
    cls: type[DeferredLogits] | None = None,
) -> DeferredLogits:
    """The logits of a product; of `parent` by `operation`, (function, arguments, keywords), and then of its class."""
    made = _Node.apply(product, cls or (DeferredLogits if parent is None else type(parent)), *product.tensors)
    made._product = product
    made._versions = [_version(t) for t in product.tensors]
    made._value = None
    made._with_grad = torch.is_grad_enabled()
    made._parent = parent
    made._operation = operation
    made._children = []
    made._hooks = []
    with torch._C.DisableTorchFunctionSubclass():
        made._node = made.grad_fn
    made._is_contiguous = False
    made._written = False
    made._loss_taken = False
    if parent is not None:
        parent._children.append(weakref.ref(made))
    return made


def defer(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> DeferredLogits:
    """`F.linear(hidden, weight, bias)`, deferred.

    >>> logits = defer(torch.ones(2, 3), torch.ones(5, 3))
    >>> (logits / 2)[0].is_materialized, logits[0].sum().item(), logits.is_materialized
    (False, 15.0, False)
    """
    return make(product_of(hidden, weight, bias))


def as_tensor(traced: Any) -> DeferredLogits:
    """What was traced, once tracing is over."""
    made = make(traced._product)
    made._loss_taken = True
    return made


def product_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Product:
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return Product(hidden, weight, bias, dtype, dtype)


def _part(value: Tensor, func: Any, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return func(value, *args, **kwargs)[i]


def _writes(name: str) -> bool:
    """PyTorch's names of what changes its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "data") or (name.startswith("__i") and name in _IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.device.type != "meta"
