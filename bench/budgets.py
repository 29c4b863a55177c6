"""Measures the linear loss at five memory budgets, in time and peak memory, beside what the planner predicts.

    python -m bench.budgets [--rounds 9] [--out DIR]

The largest budget has room for all logits, the smallest for one block of the vocabulary and no other. Each peak is the
median of fresh processes. Times come from one process, in which the budgets take turns on one thread. A time is that of
the processor, which other work on the machine disturbs least; the seconds that passed are kept as well.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy
import torch
from tabulate import tabulate
from tqdm import tqdm

from fused_ignore_ce import fused_linear_cross_entropy
from fused_ignore_ce.tools.cost import Cost, linear_cost

from . import machine
from .speed import memory
from .speed.providers import LINEAR
from .speed.workload import Case, tensors

CPU = torch.device("cpu")

#: Forward and backward of bfloat16, whose head's gradient is summed in float32 where tokens are cut into chunks.
CASE = Case("base", "linear", 1024, 32768, 512, 0.0, "bfloat16", "both")

#: The budgets, as shares of what one block takes.
SHARES = (1.0, 0.85, 0.65, 0.45, 0.25)

#: Fresh processes for a peak, and rounds of the times.
PROCESSES, ROUNDS = 3, 9

#: Points of the predicted curve.
POINTS = 60


def cost(budget: int | None = None, case: Case = CASE) -> Cost:
    return linear_cost(case.N, case.V, case.D, device=CPU, memory_budget=budget)


def budgets(case: Case = CASE) -> list[int]:
    whole = cost(case=case).plan.bytes
    return [round(share * whole) for share in SHARES]


def curve(case: Case = CASE) -> list[dict[str, float]]:
    """What is predicted for every budget between the largest and the smallest; the time relative to the first."""
    first, *_, last = budgets(case)
    costs = [cost(round(first + (last - first) * step / POINTS), case) for step in range(POINTS + 1)]
    return [{"bytes": each.plan.bytes, "ratio": each.seconds / costs[0].seconds} for each in costs]


def timed(_: int, case: Case, todo: list[int], rounds: int) -> list[list[tuple[float, float]]]:
    """For each budget, (seconds of the processor, seconds that passed) of every round."""
    torch.set_num_threads(1)
    hidden, weight, target = tensors(case, CPU)
    found: list[list[tuple[float, float]]] = [[] for _ in todo]
    for number in range(rounds + 1):
        for budget, own in zip(todo, found, strict=True):
            start = time.process_time(), time.perf_counter()
            loss = fused_linear_cross_entropy(hidden, weight, target, memory_budget=budget)
            torch.autograd.grad(loss, (hidden, weight))
            if number:  # the first round warms up
                own.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return found


def measure(case: Case = CASE, rounds: int = ROUNDS, processes: int = PROCESSES) -> list[dict[str, Any]]:
    """A row for each budget."""
    todo, name, rows = budgets(case), LINEAR[-1].name, []
    [times] = machine.in_processes(timed, case, todo, rounds)
    first = statistics.median(own for own, _ in times[0])
    for budget, own in zip(tqdm(todo, unit="budget"), times, strict=True):
        predicted = cost(budget, case)
        busy, passed = (numpy.percentile(each, (20, 50, 80)).tolist() for each in zip(*own, strict=True))
        peaks = [memory.of_loss(name, case, budget) for _ in range(processes)]
        rows.append({
            "budget": budget,
            "plan": predicted.plan.plan,
            "kept blocks": predicted.plan.kept,
            "blocks": -(-case.V // predicted.plan.tile(case.N, case.V)[1]),
            "products": predicted.flops / (2 * case.N * case.V * case.D),
            "predicted bytes": predicted.plan.bytes,
            "bytes": statistics.median(peaks),
            "predicted ratio": predicted.seconds / cost(budgets(case)[0], case).seconds,
            "ratio": busy[1] / first,
            "ms of the processor": dict(zip(("p20", "p50", "p80"), (1e3 * each for each in busy), strict=True)),
            "ms": dict(zip(("p20", "p50", "p80"), (1e3 * each for each in passed), strict=True)),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = machine.parser("bench.budgets", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of the times ({ROUNDS})")
    options = parser.parse_args()
    header = machine.header(sys.argv[1:], "bench.budgets")
    rows = measure(rounds=options.rounds)
    print(tabulate([{name: value for name, value in row.items() if name[:2] != "ms"} for row in rows], "keys"))
    result = {"header": header, "case": CASE._asdict(), "rounds": options.rounds, "processes": PROCESSES}
    path = options.out / f"budgets-{header['date']}.json"
    machine.write(path, result | {"rows": rows, "predicted curve": curve()})


if __name__ == "__main__":
    main()
