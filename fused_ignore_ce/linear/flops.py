"""Tells PyTorch's `FlopCounterMode` of the matrix products inside of the linear losses' operators.

A dispatch mode sees an operator as one call. PyTorch's table of formulas is filled once such a mode is there, because
importing it would import Triton.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..core.eager import PACKAGE, is_tracing


def _products(h: Tensor, w: Tensor, count: int) -> int:
    return 2 * h.shape[0] * w.shape[0] * h.shape[1] * count


def _sum(h: Tensor, w: Tensor, *rest: Any, **_: Any) -> int:
    need_dh, need_dw = rest[6:8]
    return _products(h, w, 1 + need_dh + need_dw)


def _forward(h: Tensor, w: Tensor, *_: Any, **__: Any) -> int:
    return _products(h, w, 1)


def _backward(dloss: Any, dlse: Any, dentropy: Any, h: Tensor, w: Tensor, *rest: Any, **_: Any) -> int:
    need_dh, need_dw = rest[7:9]
    return _products(h, w, 1 + need_dh + need_dw)


_FORMULAS = {
    "linear_cross_entropy_sum": _sum,
    "linear_cross_entropy_forward": _forward,
    "linear_cross_entropy_backward": _backward,
}


def tell_counters() -> None:
    """Adds the formulas to PyTorch's table, and to those of the counters that are active."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None or is_tracing():
        return
    modes: list[Any] = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    tables = [mode.counter.flop_registry for mode in modes if hasattr(getattr(mode, "counter", None), "flop_registry")]
    for table in (counting.flop_registry, *tables):
        for name, formula in _FORMULAS.items():
            table.setdefault(getattr(getattr(torch.ops, PACKAGE), name), formula)
