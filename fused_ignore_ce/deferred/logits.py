"""`DeferredLogits`, a tensor whose values are not computed until they are read."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .computed import differentiated, of_values, replaced, written
from .expression import Form, products_of, substitute
from .in_head import reduced, summed_divergence, take
from .loss import LOSSES
from .making import deferred_in, made
from .operations import FACTORIES, NATIVE, ON_SHAPES, RECORDED, writes
from .product import Product, product_of
from .recipe import Recipe
from .recording import recorded
from .shared_state import SharedState
from .values import Lazy, without_modes

_plainly = torch._C.DisableTorchFunctionSubclass


class DeferredLogits(Lazy):
    """Logits (..., V) of some hidden states and a head, not computed until they are read.

    Casts, scales, tanh, added biases, softmaxes, elementwise operations, operations on rows and slices of the
    vocabulary are recorded and give DeferredLogits again. `F.cross_entropy` of them is `fused_linear_cross_entropy`,
    and reductions of the vocabulary are computed a tile of rows at a time. Any other operation computes them once. To
    autograd they are a tensor like any other. Once the head or the hidden states have been changed in place (by an
    optimizer's step), reading raises RuntimeError: the logits can no longer be computed.
    """

    takes_losses = True  # read by `eager.overridden`

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
        if name == "view_as" and len(args) == 2:
            return args[0].view(args[1].shape)
        self = args[0] if args and isinstance(args[0], cls) else None
        if self is not None and name == "detach_":
            for t in (self._meta, self._value):
                if t is not None:
                    t.detach_()  # raises PyTorch's error for views
            self._is_detached = True
            with _plainly():
                return func(self)
        if self is not None and _asks_for_leaf(name, args, kwargs):
            if not self._requires_grad():
                self._become_leaf()
            return self if name == "requires_grad_" else None  # PyTorch leaks what a setter returns
        is_native = name in NATIVE or name in ("__set__ requires_grad", "__set__ grad", "__set__ _backward_hooks")
        if is_native and self is not None and not self._has_moved():
            with _plainly():
                return func(*args, **kwargs)
        if self is not None and not self._stands_alone():
            if name == "detach":
                return recorded(func, name, args, kwargs, [self])
            if name == "type" and not args[1:] and not kwargs:
                return torch.empty(0, dtype=self._meta.dtype, device=self.device).type()
        if func in LOSSES and self is not None:
            return LOSSES[func](*args, **kwargs, shared=self._shared)
        if func is Tensor.backward:
            return torch.autograd.backward(args, kwargs.pop("gradient"), **kwargs)
        if func is torch.autograd.grad or func is torch.autograd.backward:
            return differentiated(func, *args, **kwargs)
        if writes(name, kwargs):
            return written(func, name, args, kwargs)
        deferred = deferred_in((args, kwargs))
        if any(t._stands_alone() for t in deferred):
            return of_values(func, name, args, kwargs, deferred)
        if name in ON_SHAPES:
            return func(*replaced(args, {id(t): t._meta for t in deferred}), **kwargs)
        if self is not None and name in FACTORIES:
            return func(self._meta, *args[1:], **{"device": self.device, **kwargs})
        if not torch.is_inference_mode_enabled():
            done = summed_divergence(func, args, kwargs, deferred) if func is F.kl_div else None
            if done is None and name in RECORDED:
                done = recorded(func, name, args, kwargs, deferred)
            if done is None and self is not None:
                done = reduced(func, name, self, args[1:], kwargs)
            if done is not None:
                return done
        return of_values(func, name, args, kwargs, deferred)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # a static method in PyTorch's stubs
        """Computes the logits for code that bypasses __torch_function__ (C++, autograd.Function.apply)."""
        first = args[0] if args else None
        same = func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) or (
            func is torch.ops.aten.view.default and tuple(args[1]) == tuple(args[0].shape)
        )
        if same and isinstance(first, cls) and not first._stands_alone():
            return made(type(first), first._recipe, first._form, first._meta, first._device, first._shared, node=False)

        def value(t: DeferredLogits) -> Tensor:
            found = t.materialize(func.__name__)
            if torch.is_grad_enabled():
                _ = found.grad_fn  # raises PyTorch's error for a view that a write has invalidated
            return found.detach()

        values = torch.utils._pytree.tree_map_only(cls, value, (args, kwargs or {}))
        if func._schema.is_mutable and isinstance(first, cls):
            raise RuntimeError(f"logits: {func} would write to deferred logits; pass logits.clone()")
        return func(*values[0], **values[1])

    def take_loss(self, lean: Any, dense: Any, operands: list[Tensor]) -> Any:
        """A loss, see the function `take`."""
        if self._shared.settings.keep_logits and self._is_there():
            return None
        return take([self], operands, lean, dense)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # Tensor's own has no annotations
        """Shows the computed logits; if they cannot be computed any more, the shape and why."""
        try:
            shown = repr(self._aliased("repr") if self._stands_alone() else self.materialize("repr"))
            return f"Parameter containing:\n{shown}" if isinstance(self, torch.nn.Parameter) else shown
        except Exception as e:
            return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'; {e})"

    __format__ = object.__format__


def _asks_for_leaf(name: str, args: Any, kwargs: Any) -> bool:
    asked = name in ("requires_grad_", "__set__ requires_grad")
    return asked and bool(args[1] if args[1:] else kwargs.get("requires_grad", True))


def defer(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, shared: SharedState | None = None, head: Any = None
) -> DeferredLogits:
    """`F.linear(hidden, weight, bias)`, deferred; `head` is the module in whose call this is.

    >>> logits = defer(torch.ones(2, 3), torch.ones(5, 3))
    >>> (logits / 2)[0].is_materialized, logits[0].sum().item(), logits.is_materialized
    (False, 15.0, True)
    """
    logits: DeferredLogits = deferred_product(product_of(hidden, weight, bias), shared, head)
    return logits


def deferred_product(form: Form, shared: SharedState | None = None, head: Any = None, cls: Any = DeferredLogits) -> Any:
    """The logits of a form, deferred. Operations see only shapes: weights may be gathered for this call alone."""
    shared = shared or SharedState()
    recipe, device = Recipe.root(form, head), form.product.hidden.device
    with without_modes():
        meta = torch.empty(form.shape, dtype=form.dtype, device="meta")
        hidden = {id(p.hidden) for p in products_of(form)}
        shapes = form.with_tensors([t.detach()[..., :1] if id(t) in hidden else _shape_of(t) for t in form.tensors])
    logits: Any = made(cls, recipe, shapes, meta, device, shared)
    shared.deferred = True
    shared.classes = form.product.weight.shape[0]
    shared.size += meta.nbytes
    if shared.settings.keep_logits:
        _keep_until_step(logits)
    if isinstance(form, Product) and form.bias is not None and form.hidden.dim() > 2 and form.layout == "plain":
        return recorded(Tensor.view, "view", (logits, form.shape), {}, [logits]) if _bias_makes_view() else logits
    return logits


@functools.cache
def _bias_makes_view() -> bool:
    """Whether `F.linear` with a bias returns a view of a matrix. Since PyTorch 2.15, it does not."""
    with without_modes():
        one = torch.empty(1, 1, 1, device="meta")
        result = F.linear(one, one[0], one[0, 0])
    return bool(result._is_view())


def _shape_of(t: Tensor) -> Tensor:
    """A tensor without memory of the same shape; a DTensor stays, for its mesh."""
    if type(t) not in (Tensor, torch.nn.Parameter):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def as_tensor(traced: Any, shared: SharedState) -> DeferredLogits:
    """Turns traced logits into a tensor once tracing is over."""
    form = substitute(traced._form, {}, False)
    logits: DeferredLogits = deferred_product(form, shared)
    return logits.movedim(-1, 1) if traced._form.classes_second else logits  # type: ignore[return-value]  # movedim of deferred logits is deferred


#: Logits that somebody still holds, of models with `keep_logits=True`, by the serial number of their recipe.
_kept: weakref.WeakValueDictionary[int, DeferredLogits] = weakref.WeakValueDictionary()


def _keep_until_step(logits: DeferredLogits) -> None:
    """Has these logits computed before an optimizer steps, if somebody still holds them then."""
    if not _kept:
        _watch_optimizers()
    _kept[logits._recipe.serial] = logits


@functools.cache
def _watch_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def compute(*_: Any) -> None:
        for ref in _kept.valuerefs():  # a list, as other threads may add to the dictionary
            logits = _kept.pop(ref.key, None)
            if logits is not None:
                logits.materialize("optimizer.step")

    register_optimizer_step_pre_hook(compute)
