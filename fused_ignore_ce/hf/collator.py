"""A data collator whose labels ignore special tokens before anything counts them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from ..core.options import ignored_ids

_LABELS = ("labels", "shift_labels")


class IgnoreTokens:
    """Wraps a data collator: labels that are one of some ids become -100, which everything in transformers ignores.

    So `num_items_in_batch`, which `Trainer` counts from the labels and divides the loss by, counts the tokens that the
    loss keeps. Attributes other than `collator` and `ids` are the wrapped collator's.

    Args:
        collator: called with the features of a batch; returns a mapping with tensors "labels" or "shift_labels".
        ids: an id or a collection of ids.

    Raises:
        TypeError: a collator that cannot be called, ids that are no ints. When called: labels that are no integer
            tensor.
        ValueError: no ids. When called: a batch without labels.

    Examples:
        >>> import torch
        >>> collator = IgnoreTokens(lambda features: {"labels": torch.tensor(features)}, ids=[0, 7])
        >>> collator([[5, 7, 0]])
        {'labels': tensor([[   5, -100, -100]])}
    """

    def __init__(self, collator: Callable[..., Any], ids: int | Collection[int]) -> None:
        if not callable(collator):
            raise TypeError(f"collator: expected something to call with a batch's features, got {collator!r}")
        self.collator = collator
        self.ids = ignored_ids(ids)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(*args, **kwargs)
        names = [name for name in _LABELS if batch.get(name) is not None]
        if not names:
            raise ValueError(f"collator: expected a batch with one of {_LABELS}, got {sorted(batch)}")
        for name in names:
            labels = batch[name]
            if not isinstance(labels, Tensor) or labels.is_floating_point():
                what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
                raise TypeError(f"{name}: expected an integer tensor from the collator, got {what}")
            for index in self.ids:
                labels = labels.masked_fill(labels == index, -100)
            batch[name] = labels
        return batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.collator, name)
