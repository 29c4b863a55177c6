"""The tensor without memory: its values, computed once, and the memory that it shares with its views."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import forms, tiles
from .expression import is_chain
from .graph import Adopt, Nowhere, Read, are_saved_tensors_packed, connected
from .head_call import with_weights
from .recipe import Recipe, is_deferred
from .saving import Saved, shares_memory
from .shared_state import SharedState
from .views import View, in_order, no_view

_plainly = torch._C.DisableTorchFunctionSubclass
#: A context in which dispatch modes do not see the tensors without memory that tell shapes.
without_modes = torch._C._DisableTorchDispatch


class Lazy(Tensor):
    """A tensor whose values follow from a recipe; what operations do to it is in `DeferredLogits`."""

    _in_graph: Any = None  # a reference to the recipe that this tensor's node holds; None if that is not its own node
    _recipe: Any = None  # None for tensors that were made with their values
    _form: Any = None  # a Product or an Expression, of which only shapes are used
    _meta: Tensor  # shape, strides and dtype
    _device: torch.device
    _shared: SharedState
    _value: Tensor | None = None
    _version_of_value = 0
    _is_written = False  # somebody wrote to it: what counts is the value, not the recipe
    _is_lent = False  # somebody was given the value's memory, and may write there without anybody's noticing
    _is_moved = False  # the value has this tensor's place in autograd's graph
    _is_detached = False  # by detach_()
    _is_leaf = False  # because somebody told detached logits to require a gradient
    _view: View | None = None
    _views: list[weakref.ref[Lazy]]
    _saved: list[weakref.ref[Saved]]  # of the first of those that share memory: what backward needs of that memory

    @property
    def is_materialized(self) -> bool:
        """Whether these logits, or others that were made from them or that they were made from, were computed."""
        return self._shared.read

    def materialize(self, reader: str = "materialize") -> Tensor:
        """The logits as a plain tensor, computed on the first call; `reader` is the operation that a report names."""
        if self._value is None:
            if self._view is not None and (self._view.base._is_there_or_written() or not in_order(self._meta)):
                return self._aliased(reader)
            self._shared.was_read(reader)
            self._keep(functools.partial(self._fresh, reader))
        assert self._value is not None
        return self._connected(self._value)

    def _connected(self, value: Tensor) -> Tensor:
        """The value, connected to autograd's graph if this tensor is.

        The value may have been computed before this tensor was in the graph: an autograd.Function that returns the
        tensor puts it there. Or it was computed for a view whose base was then detached in place.
        """
        if not value.requires_grad and self._requires_grad():
            self._value = value = connected(Read, self, lambda: value)
        return value

    def _keep(self, compute: Callable[[], Tensor]) -> None:
        requires_grad = self._requires_grad()
        with torch.inference_mode(False), torch.set_grad_enabled(requires_grad):
            self._value = connected(Read, self, compute) if requires_grad else compute()
        self._version_of_value = self._value._version

    def _fresh(self, reader: str) -> Tensor:
        """Values in memory of their own, and no view: PyTorch lets nobody write to a view that a function made."""
        found = self._raw(reader)
        if type(found) is not Tensor:
            return found
        if found.stride() != self._meta.stride():
            strided = torch.empty_strided(found.shape, self._meta.stride(), dtype=found.dtype, device=found.device)
            found = strided.copy_(found)
        self._take_over(found)
        return no_view(found)

    def _take_over(self, values: Tensor) -> None:
        """Copies into these values what was computed for views of this tensor, so that no logit has two values."""
        for view in self._live_views():
            assert view._view is not None
            part = view._view.part_of(values)
            if view._value is None:
                view._take_over(part)
            else:
                part.copy_(view._value)

    def _raw(self, reader: str = "backward") -> Tensor:
        """The values, without a graph, as they were when this tensor was made."""
        if self._value is not None and not self._stands_alone():
            return self._value.detach()
        return self._anew(reader)

    def _anew(self, reader: str) -> Tensor:
        recipe: Recipe = self._recipe
        with torch.no_grad():
            known = any(t._is_known() for t in recipe.inputs if is_deferred(t))
            if not known and is_chain(self._form):
                return with_weights(recipe, self._of_product)
            recipe.check_unchanged()
            values = []
            for t in recipe.inputs:
                if not is_deferred(t):
                    values.append(t)
                elif t._stands_alone() or t._is_known():
                    values.append(t._raw(reader))
                else:
                    values.append(t.materialize(reader).detach())
            found: Tensor = recipe.run(values)
        return found.clone() if any(shares_memory(found, v) for v in values) else found

    def _of_product(self) -> Tensor:
        form = forms.Leaves().form(self, False)
        found: Tensor = tiles.all_logits(form, self._shared.settings.options.get("memory_budget"))
        return found.contiguous() if self._meta.is_contiguous() and form.product.layout == "plain" else found

    def _is_known(self) -> bool:
        """Whether the values follow from computed ones, without the head's weights."""
        if self._value is not None and not self._stands_alone():
            return True
        above = [t for t in self._recipe.inputs if is_deferred(t)]
        return bool(above) and all(t._is_known() for t in above)

    def _is_there(self) -> bool:
        """Whether the values are computed, or are a part of computed ones.

        To a checkpoint they never are: when it runs a function again, it must find what it found the first time.
        """
        if not self._shared.read or are_saved_tensors_packed():
            return False
        if self._value is not None or (self._view is not None and self._view.base._is_there()):
            return True
        return self._recipe is None or self._is_known()

    def _is_there_or_written(self) -> bool:
        return self._value is not None or self._stands_alone()

    def _stands_alone(self) -> bool:
        """Whether the computed value stands for this tensor: somebody wrote to it, or there is no recipe."""
        if self._is_written or self._recipe is None:
            return True
        if self._is_lent and not (are_saved_tensors_packed() and self._is_as_made()):
            return True
        if self._value is not None and self._value._version != self._version_of_value:
            return True
        return self._view is not None and self._view.base._stands_alone()

    def _is_as_made(self) -> bool:
        """Whether nobody has written to memory that was lent. A checkpoint has to find what it found at first."""
        assert self._value is not None
        return torch.equal(self._value.detach(), self._anew("checkpoint"))

    def _aliased(self, reader: str) -> Tensor:
        """The computed tensor. It lies in the memory of the computed base, if this tensor is a view.

        To autograd, it is no view of that base but computed from this tensor, unless the base was written to.
        """
        if self._view is None:
            return self.materialize(reader)
        if self._has_moved():
            assert self._value is not None
            return self._connected(self._value)
        view = self._view
        value = view.base._aliased(reader)
        if self._value is None or not shares_memory(self._value, value):
            self._keep(lambda: view.part_of(value.detach()))
        assert self._value is not None
        return self._connected(self._value)

    def _views_of_each_other(self) -> dict[int, Tensor]:
        """The computed tensors of all that share memory with this one, by `id`, as autograd's views of each other."""
        found: dict[int, Tensor] = {}
        for member in self._family():
            moved = member._value if member._is_moved else None
            if member._view is None:
                value = root = member.materialize("view")
            elif moved is not None and (not moved._is_view() or moved._base is root or member._is_leaf):
                value = member._connected(moved)
            else:
                with torch.inference_mode(False), torch.set_grad_enabled(member._view.with_gradients):
                    value = member._view.part_of(found[id(member._view.base)])
                if member._requires_grad() and not value.requires_grad and not member._is_of_detached():
                    # an autograd.Function handed it on, detached
                    member._keep(functools.partial(no_view, value))
                    assert member._value is not None
                    value = member._connected(member._value)
            found[id(member)] = value
        return found

    def _has_moved(self) -> bool:
        """Whether the computed value has this tensor's place in the graph, because somebody wrote to it.

        PyTorch gives a view a new place whenever its memory was written to, and others if the write is recorded.
        """
        if not self._is_moved and self._stands_alone():
            if self._view is not None:
                if self._value is None or self._value._version != self._version_of_value:
                    self._move(self._views_of_each_other()[id(self)])
            elif self._value is not None and getattr(self._value.grad_fn, "_forward_cls", None) is not Read:
                self._is_moved = True
        return self._is_moved

    def _move(self, value: Tensor) -> None:
        """Gives this tensor the place in the graph of a computed one that stands for it from now on."""
        unchanged = self._value is not None and self._value._version == self._version_of_value
        with torch.inference_mode(False), torch.enable_grad(), _plainly():
            if self.requires_grad and not value.requires_grad and self._is_of_detached():
                value = connected(Nowhere, torch.zeros((), requires_grad=True), no_view(value))
            holder = self if self._value is None or self.retains_grad else self._value
            self._value, self._is_written, self._is_moved = value, True, True
            with contextlib.suppress(RuntimeError):  # PyTorch invalidates some views, whose `grad_fn` is an error then
                _ = value.grad_fn
                retains, grad = holder.retains_grad, holder.grad if holder.retains_grad else None
                if self._view is not None and not self.retains_grad:
                    self.detach_()  # the node of a view, and the hooks on it, lead nowhere from now on
                if not value.requires_grad:
                    return
                same = torch.autograd.grad_mode._unsafe_preserve_version_counter(self)
                with same if unchanged else contextlib.nullcontext():
                    connected(Adopt, self, value)
                if retains and not value.retains_grad:
                    value.retain_grad()
                    value.grad = grad

    def _is_of_detached(self) -> bool:
        """Whether this is a view of logits that have been detached in place since."""
        base = None if self._view is None else self._view.base
        return base is not None and (base._is_detached or base._is_of_detached())

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """A context: what is saved for backward in it is copied before somebody writes to these logits."""
        first = self._family()[0]

        def pack(t: Tensor) -> Saved:
            saved = Saved(t)
            if first._value is not None and shares_memory(t, first._value):
                first._saved.append(weakref.ref(saved))
            return saved

        if are_saved_tensors_packed():
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(pack, Saved.tensor)

    def _can_be_fused(self) -> bool:
        """Whether a gradient of these logits reaches the recipe's inputs, or there is none."""
        if self._stands_alone():
            return False
        if not self._requires_grad() or any(self._recipe.needs):
            return True
        return self._became_result_of_function()

    def _became_result_of_function(self) -> bool:
        """Takes on the recipe of the logits that an autograd.Function gave back, as they are, detached or cloned.

        DeepSpeed puts such functions behind every module, PyTorch behind one that has backward hooks, and DDP behind
        the model. Autograd gives the tensor the function's node, which gradients pass on their way to the logits that
        the function was given.
        """
        recipe: Recipe = self._recipe
        if recipe.name not in ("detach", "view", "clone") or self.grad_fn is None:
            return False
        (source,) = recipe.inputs
        if source.shape != self.shape or not source._can_be_fused():
            return False
        self._recipe = source._recipe
        return True

    def _requires_grad(self) -> bool:
        with _plainly():
            return self.requires_grad

    def _become_leaf(self) -> None:
        """Detached logits that are told to require a gradient: the computed tensor is the leaf."""
        value = self._aliased("requires_grad_")
        value.requires_grad_()
        self._is_written = self._is_moved = self._is_leaf = True
        with _plainly(), torch.enable_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(self):
            connected(Adopt, self, value)

    def _family(self) -> list[Lazy]:
        """All tensors that share memory with this one."""
        root = self
        while root._view is not None:
            root = root._view.base
        family = [root]
        for member in family:
            family += member._live_views()
        return family

    def _live_views(self) -> list[Lazy]:
        return [view for reference in self._views if (view := reference()) is not None]

    def becomes(self, view: View) -> None:
        """Notes that this tensor is a view of another one."""
        self._view = view
        view.base._views.append(weakref.ref(self))

    @property
    def classes(self) -> int:
        """The size of the vocabulary's dimension."""
        return int(self.shape[1 if getattr(self._form, "classes_second", False) else -1])
