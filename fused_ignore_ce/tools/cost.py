"""Predicts by arithmetic what a linear loss will cost: the memory of the plain path and of ours, and the least time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..linear.machines import MACHINES
from ..linear.plan import VOCABULARY_BLOCKS, LinearPlan, Sizes, operand_dtype, plan_linear_loss

#: Where the rates of `MACHINES` come from.
RATES = {
    "cpu": "measured on two cores of another CPU",
    "cuda": "70% of an H100's data sheet, not measured",
}


class Rate(NamedTuple):
    """How many operations per second matrix products reach, and where that number comes from."""

    flops: float
    source: str


class Cost(NamedTuple):
    """The cost of a loss: bytes beside hidden states, head and their gradients; operations of forward and backward."""

    plain_bytes: int
    plan: LinearPlan
    plain_flops: int
    flops: int
    seconds: float  # of forward and backward, by the model that plans are chosen by


def plain_linear_bytes(N: int, V: int, D: int, dtype: torch.dtype, *, upcast: bool = True) -> int:
    """Peak of `F.cross_entropy(F.linear(h, w).float(), y)` beside the operands and their gradients.

    Backward holds three tensors of the logits' shape: log-softmax, its gradient, and the gradient of the upcast
    logits. The gradients that are returned do not exist at that time, and take over that memory later, when only the
    gradient of the logits is left. GEMM libraries add buffers of their own, up to 40 MiB on a CPU.
    """
    wide = 4 if upcast and dtype.itemsize < 4 else dtype.itemsize
    return max(3 * wide * N * V - (N + V) * D * dtype.itemsize, dtype.itemsize * N * V)


def plain_logits_bytes(N: int, V: int, dtype: torch.dtype, *, upcast: bool = True) -> int:
    """Peak of `F.cross_entropy(x.float(), y)` beside the logits and their gradient.

    Backward holds the same three tensors. The gradient of the logits is one of them, unless logits are upcast: then it
    is made later.
    """
    wide = 4 if upcast and dtype.itemsize < 4 else dtype.itemsize
    return (3 * wide - dtype.itemsize) * N * V


def linear_cost(
    num_tokens: int,
    num_classes: int,
    num_features: int,
    *,
    num_ignored: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    memory_budget: int | str | None = None,
) -> Cost:
    """Predicts the cost of a loss, forward and backward, on both paths. The arguments are `plan_linear_loss`'s.

    The plain path multiplies all tokens, and ours only the kept ones. Both take three products of 2NVD operations. Ours
    takes a fourth where the plan computes the logits again.

    >>> linear_cost(16384, 128256, 4096, num_ignored=12288).plan.plan
    'one block'
    """
    plan = plan_linear_loss(
        num_tokens, num_classes, num_features, num_ignored=num_ignored, dtype=dtype, device=device,
        memory_budget=memory_budget,
    )  # fmt: skip
    kept, device = num_tokens - num_ignored, torch.device(device)
    sizes = Sizes(
        kept, num_classes, num_features, operand_dtype(dtype, device), dtype, dtype, device.type, dinput=True,
        dweight=True, gathered=num_ignored > 0, recompute=dtype == torch.float16, probs=False,
    )  # fmt: skip
    again = 1.0 * (plan.plan == VOCABULARY_BLOCKS or dtype == torch.float16)
    again *= 1.0 - plan.kept * plan.chunk / num_classes
    return Cost(
        plain_linear_bytes(num_tokens, num_classes, num_features, dtype),
        plan,
        6 * num_tokens * num_classes * num_features,
        round((6 + 2 * again) * kept * num_classes * num_features),
        sizes.seconds_of(plan),
    )


def curve(num_tokens: int, num_classes: int, num_features: int, **options: Any) -> list[Cost]:
    """The costs of the loss with less and less memory: without a budget, with two thirds of it, and so on.

    It ends where no plan fits, or takes twice the time. The options are those of `linear_cost` but for `memory_budget`.

    >>> [round(cost.flops / (2 * 8192 * 128256 * 4096), 2) for cost in curve(8192, 128256, 4096)]
    [3.0, 3.55, 3.73, 4.0, 4.0, 4.0]
    """
    found = [linear_cost(num_tokens, num_classes, num_features, **options)]
    budget = found[0].plan.bytes
    while budget:
        budget = budget * 2 // 3
        try:
            cost = linear_cost(num_tokens, num_classes, num_features, memory_budget=budget, **options)
        except ValueError:  # no plan is that lean
            break
        if cost.seconds > 2 * found[0].seconds:
            break
        if cost.plan.bytes < found[-1].plan.bytes:
            found.append(cost)
    return found


def known_rate(dtype: torch.dtype, device: torch.device) -> Rate:
    """The rate that the library's own predictions assume."""
    itemsize = operand_dtype(dtype, device).itemsize
    kind = device.type if (device.type, itemsize) in MACHINES else "cuda"
    return Rate(MACHINES[kind, itemsize].flops, RATES[kind])


def report(
    num_tokens: int,
    num_classes: int,
    num_features: int,
    *,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    memory_budget: int | str | None = None,
    rate: Rate | None = None,
) -> str:
    """`linear_cost` as `python -m fused_ignore_ce plan` prints it. The default rate is `known_rate`'s."""
    device = torch.device(device)
    num_ignored = round(num_tokens * ignored)
    kept = num_tokens - num_ignored
    cost = linear_cost(
        num_tokens, num_classes, num_features, num_ignored=num_ignored, dtype=dtype, device=device,
        memory_budget=memory_budget,
    )  # fmt: skip
    rate = known_rate(dtype, device) if rate is None else rate
    name = str(dtype).removeprefix("torch.")
    rows = (
        ("plain", cost.plain_bytes, cost.plain_flops, "F.cross_entropy(F.linear(h, w).float(), y)"),
        ("fused", cost.plan.bytes, cost.flops, f"fused_linear_cross_entropy(h, w, y): {_tiles(cost.plan)}"),
    )
    sizes = f"{num_tokens} tokens, {kept} of them kept; {num_classes} classes, {num_features} features"
    lines = [
        f"{sizes}; {name}, {device.type}",
        "",
        f"{'':5}  {'scratch':>10}  {'products':>13}  {'at least':>10}",
    ]
    for title, size, flops, text in rows:
        work = f"{flops / 1e12:.4g} TFLOP"
        lines.append(f"{title:5}  {_size(size):>10}  {work:>13}  {_time(flops / rate.flops):>10}  {text}")
    shape = (num_tokens, num_classes, num_features)
    costs = curve(*shape, num_ignored=num_ignored, dtype=dtype, device=device)
    if memory_budget is None and len(costs) > 1:
        one = max(2 * kept * num_classes * num_features, 1)
        lines += ["", f"{'with less memory':>17}  {'products':>13}  {'time':>10}"]
        for c in costs:
            time = c.seconds / costs[0].seconds
            lines.append(f"{_size(c.plan.bytes):>17}  {c.flops / one:>13.2f}  {time:>10.2f}  {_tiles(c.plan)}")
    return "\n".join(
        [
            *lines,
            "",
            "scratch: memory at the peak, beside hidden states, head and their gradients, by formula",
            "at least: the matrix products alone, forward and backward, at "
            f"{rate.flops / 1e12:.4g} TFLOP/s ({rate.source})",
            "with less memory: by memory_budget; matrix products, of which three are the fewest, and predicted time "
            "over that of the first line",
        ]
    )


def _tiles(plan: LinearPlan) -> str:
    unit = "classes" if plan.plan == VOCABULARY_BLOCKS else "tokens"
    return f"{plan.plan} of {plan.chunk} {unit}" + f", {plan.kept} of them kept" * (plan.kept > 0)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
