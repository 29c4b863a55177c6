"""The functions that a backend offers; `choice` says which backend runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..core.distillation import DistillationOptions
from ..core.options import LossOptions
from ..core.rows import Block, Logits, Rows, Saved, Upstream

if TYPE_CHECKING:
    from .divergences import DistilledRows, Teacher

#: The sums over blocks of the vocabulary, (5, parts, N), and their argmax (parts, N), empty without statistics.
Parts = tuple[Tensor, Tensor]


class Backend(Protocol):
    """The functions that a backend offers.

    Logits, probabilities, `dx` and `dprobs` are (B, T, V) with any strides; class weights (V,) and targets (B * T,),
    int64, are contiguous. An ignored row has `target == options.ignore_index`.
    """

    def forward(
        self,
        logits: Logits,
        options: LossOptions,
        *,
        with_stats: bool,
    ) -> Rows:
        """The results of all rows."""

    def new_parts(self, x: Tensor, parts: int, with_stats: bool) -> Parts:
        """Allocates what `forward_part` writes for `parts` blocks."""

    def forward_part(
        self,
        logits: Logits,
        options: LossOptions,
        *,
        parts: Parts,
        part: int,
        block: Block,
        with_stats: bool,
    ) -> None:
        """Writes the sums over one block of the vocabulary into number `part` of `parts`."""

    def combine(self, parts: Parts, options: LossOptions) -> Parts:
        """The sums over all parts, as one part."""

    def merge(self, target: Tensor, parts: Parts, options: LossOptions, *, with_stats: bool) -> Rows:
        """The results of all rows, from all parts."""

    def backward(
        self,
        upstream: Upstream,
        logits: Logits,
        saved: Saved,
        options: LossOptions,
        *,
        dx: Tensor | None,
        dprobs: Tensor | None,
        block: Block | None,
    ) -> None:
        """Writes the gradients of kept rows, and zeros for ignored ones, into `dx` and `dprobs`.

        `dx` may be `logits.x`. Without a block, the logits have the whole vocabulary.
        """

    def forward_backward(
        self,
        upstream: Upstream,
        logits: Logits,
        options: LossOptions,
        *,
        dx: Tensor,
        dz: Tensor | None,
        with_stats: bool,
    ) -> Rows:
        """The results of all rows; writes the gradient of their scaled sum into `dx`, which may be `logits.x`.

        `upstream` has the factors of the losses. `dz` (N,) are those of `options.z_loss * lse**2`; None for no z-loss.
        """

    def scale(self, dx: Tensor, factor: Tensor | None, dloss: Tensor, *, out: Tensor | None = None) -> None:
        """`dx * dloss * factor`, in place or into `out`. In place, a backend may skip the work if the product is 1."""


class Distiller(Protocol):
    """The functions of a backend for distillation. Logits x, and a teacher's, are (N, V) with any strides."""

    def forward(
        self, x: Tensor, teacher: Teacher, target: Tensor, options: DistillationOptions, *, with_stats: bool
    ) -> tuple[DistilledRows, Tensor]:
        """The results of all rows, and what `backward` needs of them."""

    def backward(
        self,
        dloss: Tensor,
        x: Tensor,
        teacher: Teacher,
        target: Tensor,
        saved: Tensor,
        options: DistillationOptions,
        *,
        dx: Tensor,
    ) -> None:
        """Writes the gradient of `sum(loss * dloss)` into `dx`, zeros in ignored rows."""

    def forward_backward(
        self,
        scale: Tensor,
        x: Tensor,
        teacher: Teacher,
        target: Tensor,
        options: DistillationOptions,
        *,
        dx: Tensor,
        with_stats: bool,
    ) -> DistilledRows:
        """The results of all rows; writes the gradient of `sum(loss * scale)` into `dx`, which may be `x`."""
