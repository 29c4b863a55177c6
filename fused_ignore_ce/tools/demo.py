"""Trains two copies of a small language model in alternating steps: one as transformers has it, one patched."""

from __future__ import annotations

import importlib.util
import math
import random
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hf.patching import fusion_report, patch_model
from .demo_data import END, IGNORED, Batch, functions, make_batches, train_tokenizer
from .measure import PeakMemory, clock

#: Steps from one measurement of memory to the next. That step is not timed, since `PeakMemory` itself takes time.
MEMORY_EVERY = 10
#: In nats. The two losses round differently in float32, and training amplifies that: 8e-4 after 300 steps on a CPU.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Options:
    """What to train, on what, and where the picture goes."""

    steps: int = 300
    batch: int = 4
    length: int = 256
    vocab: int = 8192
    hidden: int = 96
    functions: int = 4000
    seed: int = 0
    device: str = "cpu"
    out: Path = Path("demo-loss.png")


@dataclass
class Run:
    """A model in training, and what its steps cost: seconds of the timed steps, peak bytes of the others."""

    name: str
    model: Any
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self, ids: Tensor, labels: Tensor, measure_memory: bool) -> None:
        """Forward, backward and optimizer."""
        device = ids.device
        with PeakMemory(device) if measure_memory else nullcontext() as peak:
            start = clock(device)
            # No attention mask: the padding is on the right, where causal attention does not look.
            loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            seconds = clock(device) - start
        self.losses.append(loss.item())
        if peak is None:
            self.seconds.append(seconds)
        elif peak.bytes is not None:
            self.peaks.append(max(0, peak.bytes))


class Costs(NamedTuple):
    """What a step costs: median milliseconds, largest peak in MiB; NaN for what could not be measured."""

    ms: float
    mib: float


def costs(run: Run) -> Costs:
    milliseconds = 1e3 * statistics.median(run.seconds) if run.seconds else math.nan
    return Costs(milliseconds, max(run.peaks, default=math.nan) / 2**20)


def ratios(plain: Run, fused: Run) -> Costs:
    """Plain over fused: the median of the ratios of each step's two times, and the ratio of the peaks."""
    times = [a / b for a, b in zip(plain.seconds, fused.seconds, strict=True)]
    most = costs(fused).mib
    return Costs(statistics.median(times) if times else math.nan, costs(plain).mib / most if most else math.nan)


def quartiles(seconds: list[float]) -> tuple[float, float]:
    """Milliseconds between which half of the steps lie."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return 1e3 * low, 1e3 * high


def run(options: Options) -> int:
    """Trains both models, prints the table, saves the picture; returns 1 if the curves differ."""
    _require("transformers", "tokenizers", "tqdm", "matplotlib")
    examples = list(islice(functions(options.seed), options.functions))
    random.Random(options.seed).shuffle(examples)
    tokenizer = train_tokenizer(examples, options.vocab)
    options = replace(options, vocab=tokenizer.get_vocab_size())
    batches = make_batches(
        tokenizer, examples, steps=options.steps, batch=options.batch, length=options.length, device=options.device
    )
    described = describe(batches, options)
    print(f"{len(examples)} functions of Python's standard library, {described}")
    plain, fused = Run("plain", make_model(options)), Run("fused", patch_model(make_model(options)))
    train_in_turns(plain, fused, batches)
    print(LEGEND, table(plain, fused), "", fusion_report(fused.model), sep="\n")
    draw(plain, fused, described, options.out)
    difference = (torch.tensor(plain.losses) - torch.tensor(fused.losses)).abs().max().item()
    same = difference <= TOLERANCE  # false for NaN
    verdict = "within" if same else "ABOVE"
    print(f"\nThe curves and costs are drawn in {options.out}.")
    print(f"Largest difference between the two loss curves: {difference:.1e} nats, {verdict} {TOLERANCE}")
    return 0 if same else 1


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)}: needed by the demo and not installed; pip install 'fused_ignore_ce[demo]'"
        )


def describe(batches: list[Batch], options: Options) -> str:
    """A description of the steps, for the output and the picture."""
    # Position t predicts label t + 1, so that no position predicts a row's first label.
    kept = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches)
    positions = sum(labels.numel() for _, labels in batches)
    return (
        f"{options.steps} steps of {options.batch} x {options.length} tokens, {1 - kept / positions:.0%} of them "
        f"ignored (prompts and padding), vocabulary {options.vocab}, float32, on {options.device}"
    )


def make_model(options: Options) -> Any:
    """A Llama of two layers with random weights, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=options.length,
        bos_token_id=END,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).to(options.device)


def train_in_turns(plain: Run, fused: Run, batches: list[Batch]) -> None:
    """Trains both models on each batch, one right after the other; which one comes first alternates.

    Other work of the machine then slows both alike.
    """
    from tqdm import tqdm

    turns = plain, fused
    for step, (ids, labels) in enumerate(progress := tqdm(batches, unit="step"), start=1):
        for current in turns:
            current.step(ids, labels, measure_memory=step % MEMORY_EVERY == 0 or step == len(batches))
        turns = turns[1], turns[0]
        progress.set_postfix(plain=f"{plain.losses[-1]:.3f}", fused=f"{fused.losses[-1]:.3f}", refresh=False)


LEGEND = """
plain, fused    the model as transformers has it, and the same after patch_model(model)
loss, last 20   nats per kept token: the last step's, and the mean of the last 20 steps
ms/step         forward, backward and optimizer: the median step
peak MiB        memory that a step takes beside the model and the optimizer: the largest that was measured
plain / fused   the median of the ratios of the same step's two times; the ratio of the two peaks
"""


def table(plain: Run, fused: Run) -> str:
    """A table with one row per run, and one row with the ratios of their costs."""
    rows: list[tuple[str, ...]] = [("run", "loss", "last 20", "ms/step", "peak MiB")]
    for run in (plain, fused):
        losses = f"{run.losses[-1]:.4f}", f"{statistics.fmean(run.losses[-20:]):.4f}"
        rows.append((run.name, *losses, *map(_cell, costs(run))))
    rows.append(("plain / fused", "", "", *map(_cell, ratios(plain, fused))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


PLAIN_COLOR, FUSED_COLOR = "#8a8a8a", "#c8372d"


def draw(plain: Run, fused: Run, described: str, out: Path) -> None:
    """Saves the loss curves, and what a step costs in time and in memory."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12))
    figure.suptitle(described, fontsize="medium", color="0.35")
    curves, time, memory = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
    curves.plot(plain.losses, color=PLAIN_COLOR, linewidth=3, label="plain (transformers)")
    curves.plot(fused.losses, color=FUSED_COLOR, linewidth=1, label="fused (patch_model)")
    curves.set(xlabel="step", ylabel="nats per kept token", title="Loss")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False)
    (plain_ms, plain_mib), (fused_ms, fused_mib), factors = costs(plain), costs(fused), ratios(plain, fused)
    note = f"median of plain / fused: {factors.ms:.2f}\nlines: the middle half of the steps"
    _bars(time, "Time of a step", "ms", (plain_ms, fused_ms), note)
    _bars(memory, "Peak memory of a step", "MiB", (plain_mib, fused_mib), f"plain / fused: {factors.mib:.2f}")
    for x, run in enumerate((plain, fused)):
        if run.seconds:
            time.vlines(x, *quartiles(run.seconds), color="black", linewidth=1)
    figure.savefig(out, dpi=150)


def _bars(axes: Any, title: str, unit: str, values: tuple[float, float], note: str) -> None:
    """Two bars with their values; no bar for a NaN."""
    axes.set(title=title, xlim=(-0.5, 1.5), xticks=[], yticks=[])
    axes.spines[["top", "left", "right"]].set_visible(False)
    if any(map(math.isnan, values)):
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    axes.bar((0, 1), values, width=0.6, color=(PLAIN_COLOR, FUSED_COLOR))
    axes.set_xticks(
        (0, 1), [f"{name}\n{value:.3g} {unit}" for name, value in zip(("plain", "fused"), values, strict=True)]
    )
    axes.set_xlabel(note)
