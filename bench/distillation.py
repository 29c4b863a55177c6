"""Compares distillation losses on this machine: values, gradients, time and peak memory.

    python -m bench.distillation [--out DIR]

All losses start from the hidden states of student and teacher. They take turns, on a CPU on one thread, whose processor
time is counted, so that other processes disturb less. Each figure of peak memory comes from a fresh process. It writes
DIR/distillation-<date>.json, from which `bench.figures` writes a table and draws a picture, in a few minutes on two
idle cores.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from fused_ignore_ce import fused_linear_distillation_loss
from fused_ignore_ce.backends import reference

from . import machine
from .packages import imported, version
from .speed.memory import peak_bytes
from .speed.workload import DEVICE

#: `loss(h, w, teacher_h, teacher_w, target, beta)`: the mean over the rows whose target is not -100 of the divergence
#: with this beta. 0 stands for the forward Kullback-Leibler divergence.
Loss = Callable[..., Tensor]

#: The rounds in which losses take turns.
ROUNDS = 5


class Case(NamedTuple):
    """What is measured. The teacher has twice as many features as the student."""

    N: int
    V: int
    D: int
    ignored: float
    beta: float

    def tensors(self) -> list[Tensor]:
        """Hidden states and head of the student, which require gradients, those of the teacher, and targets."""
        torch.manual_seed(0)
        D, E, dtype = self.D, 2 * self.D, torch.bfloat16
        shapes = (self.N, D), (self.V, D), (self.N, E), (self.V, E)
        h, w, th, tw = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
        target = torch.randint(self.V, (self.N,), device=DEVICE)
        target[: round(self.ignored * self.N)] = -100
        return [h.requires_grad_(), w.div_(D**0.5).requires_grad_(), th, tw.div_(E**0.5), target]


def plain(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, beta: float) -> Tensor:
    """What one writes: the logits of both sides in float32, their log-probabilities, the divergence of each class."""
    log_q, log_p = F.linear(h, w).float().log_softmax(-1), F.linear(th, tw).float().log_softmax(-1)
    if beta == 0.0:
        rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        log_m = torch.logaddexp(log_p + torch.tensor(beta).log(), log_q + torch.tensor(1.0 - beta).log())
        of_p = F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1)
        rows = beta * of_p + (1.0 - beta) * F.kl_div(log_m, log_q, log_target=True, reduction="none").sum(-1)
    return rows[y != -100].mean()


def ours(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, beta: float) -> Any:
    options: dict[str, Any] = {"divergence": "forward_kl"} if beta == 0.0 else {"divergence": "jsd", "beta": beta}
    loss: Any = fused_linear_distillation_loss(h, w, th, tw, y, loss_dtype=torch.float32, **options)
    return loss


def trl_gkd(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRL's GKDTrainer, from logits in the dtype of the hidden states."""
    loss: Tensor = imported("trl.experimental.gkd", "GKDTrainer").generalized_jsd_loss(
        F.linear(h, w), F.linear(th, tw), y, beta=beta
    )
    return loss


def trl_chunked(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRL's DistillationTrainer, which projects the kept tokens only on a GPU."""
    function = imported("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
    loss: Tensor = function(h, th, w, tw, y != -100, beta)[0]
    return loss


def liger_chunked(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor, beta: float) -> Tensor:
    """Liger's loss of hidden states in PyTorch, uncompiled; its kernel for logits needs a GPU."""
    module = imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    loss: Tensor = module(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)(h, w, th, tw, y)
    return loss


#: By name: the distribution that it needs, and the loss. The first is the baseline of ratios, the last this package's.
LOSSES: dict[str, tuple[str | None, Loss]] = {
    "log_softmax and F.kl_div": (None, plain),
    "TRL, GKDTrainer": ("trl", trl_gkd),
    "TRL, DistillationTrainer": ("trl", trl_chunked),
    "Liger, LigerFusedLinearJSDLoss": ("liger-kernel", liger_chunked),
    "fused_linear_distillation_loss": (None, ours),
}

#: The comparison of all losses, and the vocabularies at which the first and the last are drawn.
COMPARED = [Case(256, 32000, 256, ignored, 0.5) for ignored in (0.0, 0.75)]
DRAWN = [Case(128, V, 256, 0.0, 0.0) for V in (32000, 128256, 256000)]


def installed() -> dict[str, Loss]:
    return {name: loss for name, (package, loss) in LOSSES.items() if package is None or version(package)}


def errors(loss: Loss, case: Case) -> list[float]:
    """How far the loss and its gradients are from float64's of the same operands, relative to the largest value."""
    *operands, y = case.tensors()
    wide = [t.detach().double() for t in operands]
    h, w = (t.requires_grad_() for t in wide[:2])
    names = {"divergence_name": "forward_kl"} if case.beta == 0.0 else {"divergence_name": "jsd", "beta": case.beta}
    rows = reference.distillation_rows(F.linear(h, w), F.linear(*wide[2:]), y, **names)
    true = [total := rows.sum() / (y != -100).sum(), *torch.autograd.grad(total, (h, w))]
    value = loss(*operands, y, case.beta)
    found = [value, *torch.autograd.grad(value, operands[:2])]
    return [float((a.detach().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, true, strict=True)]


def milliseconds(losses: dict[str, Loss], case: Case, rounds: int = ROUNDS) -> dict[str, float]:
    """The median time of forward and backward of losses that take turns; on a CPU, processor time."""
    *operands, y = case.tensors()
    found: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds + 1):
        for name, loss in losses.items():
            start = _clock()
            torch.autograd.grad(loss(*operands, y, case.beta), operands[:2])
            found[name].append(1e3 * (_clock() - start))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def _clock() -> float:
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(_: int, name: str, case: Case) -> int:
    """Bytes that a loss holds at its peak, above its operands and their gradients."""
    _package, loss = LOSSES[name]
    *operands, y = case._replace(N=64, V=2048).tensors()
    loss(*operands, y, case.beta).backward()  # starts thread pools, runs lazy imports
    *operands, y = case.tensors()
    held = peak_bytes(DEVICE, lambda: loss(*operands, y, case.beta).backward())
    return held - sum(t.nbytes for t in operands[:2])


def main() -> int:
    options = machine.parser("bench.distillation", __doc__).parse_args()
    torch.set_num_threads(1)
    header, rows = machine.header(sys.argv[1:], "bench.distillation"), []
    first, *_, last = LOSSES
    for case in tqdm([*COMPARED, *DRAWN], unit="case"):
        losses = {name: loss for name, loss in installed().items() if case in COMPARED or name in (first, last)}
        ms = milliseconds(losses, case)
        for name, loss in losses.items():
            error, *gradients = errors(loss, case._replace(N=32)) if case in COMPARED else (None, 0.0)
            rows.append(case._asdict() | {
                "compared": case in COMPARED, "loss": name, "ms": ms[name], "ratio": ms[name] / ms[first],
                "bytes": machine.in_processes(peak, name, case)[0], "error": error, "gradient error": max(gradients),
            })  # fmt: skip
    path = machine.write(options.out / f"distillation-{header['date']}.json", {"header": header, "rows": rows})
    columns = ("V", "ignored", "loss", "ms", "ratio", "bytes")
    print(tabulate([[row[column] for column in columns] for row in rows], columns), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
