"""How a tensor is a part of another one's memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class View(NamedTuple):
    """How a deferred tensor is a part of another one's memory."""

    base: Any
    func: Any
    args: Any = ()
    kwargs: Any = {}  # noqa: RUF012 (never written)
    part: int | None = None  # which of several results
    with_gradients: bool = True  # whether it was made while gradients were enabled

    def part_of(self, value: Tensor) -> Tensor:
        """The part of the base's values."""
        found: Tensor = self.func(value, *self.args, **self.kwargs)
        return found if self.part is None else found[self.part]


def no_view(t: Tensor) -> Tensor:
    """A tensor of the same memory that autograd does not know as a view."""
    if not t._is_view():
        return t
    made = t.new_empty(0)
    return made.set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def in_order(t: Tensor) -> bool:
    """Whether strides do not grow from one dimension to the next, as those of a computed part of the logits."""
    return sorted(t.stride(), reverse=True) == list(t.stride())
