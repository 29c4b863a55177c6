"""Train a small language model twice on Python's own sources: with transformers' loss, and with the fused one."""

from __future__ import annotations

import ast
import importlib.util
import math
import random
import statistics
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .causal_lm import fused_causal_lm_loss
from .measure import PeakMemory, clock

Batch = tuple[Tensor, Tensor]

IGNORED = -100
#: Id of the token that ends a function and pads a row.
END = 0
#: Folders of the standard library that hold tests, tables, or other people's code.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "site-packages", "dist-packages"}
#: Memory is measured every so many steps, not in each: what it does first (see `PeakMemory`) costs a step time.
MEMORY_EVERY = 10
#: Nats. The two losses round differently, in float32, and training amplifies that: 8e-4 after 300 steps on a CPU.
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


class Example(NamedTuple):
    """A function's source in two parts: the prompt is given, the body is learnt."""

    prompt: str
    body: str


@dataclass
class Run:
    """What one training run measured."""

    name: str
    kept: int
    ignored: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def run(options: Options) -> int:
    """Trains both models, prints the table, saves the picture; returns 1 if the curves differ."""
    _require("transformers", "tokenizers", "tqdm", "matplotlib")
    examples = list(islice(functions(options.seed), options.functions))
    random.Random(options.seed).shuffle(examples)
    tokenizer = train_tokenizer(examples, options.vocab)
    options = replace(options, vocab=tokenizer.get_vocab_size())
    batches = make_batches(tokenizer, examples, options)
    print(
        f"{len(examples)} functions of Python's standard library; {options.steps} steps of {options.batch} x "
        f"{options.length} tokens, vocabulary {options.vocab}, float32, on {options.device}"
    )
    plain = train("plain", None, batches, options)
    fused = train("fused", fused_causal_lm_loss, batches, options)
    print(LEGEND, table(plain, fused), sep="\n")
    draw(plain, fused, options.out)
    difference = (torch.tensor(plain.losses) - torch.tensor(fused.losses)).abs().max().item()
    same = difference <= TOLERANCE  # not so for NaN
    verdict = "within" if same else "ABOVE"
    print(f"\nlargest difference between the curves, {options.out}: {difference:.1e} nats, {verdict} {TOLERANCE}")
    return 0 if same else 1


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"The demo needs {', '.join(missing)}: pip install 'fused_ignore_ce[demo]'")


def functions(seed: int) -> Iterator[Example]:
    """The functions of the standard library, its files in random order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    for path in files:
        yield from split_functions(path.read_text(encoding="utf-8", errors="ignore"))


def split_functions(source: str) -> Iterator[Example]:
    """Every function: its signature and docstring as the prompt, the statements after them as the body."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        if not statements:
            continue
        first = statements[0]
        begin = min(part.lineno for part in (first, *getattr(first, "decorator_list", ()))) - 1
        if not lines[begin][: first.col_offset].isspace():
            continue  # the body begins in a line of the signature or the docstring
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        cut = begin - node.lineno + 1
        yield Example("\n".join(whole[:cut]) + "\n", "\n".join(whole[cut:]) + "\n")


def train_tokenizer(examples: list[Example], vocab: int) -> Any:
    """Byte-level byte-pair encoding, so that every source can be encoded."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    texts = (text for example in examples for text in example)
    tokenizer.train_from_iterator(texts, vocab, special_tokens=["<end>"], show_progress=False)
    return tokenizer


def encode(tokenizer: Any, example: Example, length: int) -> tuple[list[int], list[int]]:
    """(ids, labels), cut or padded to `length`; the labels of the prompt and of the padding are ignored."""
    prompt = tokenizer.encode(example.prompt).ids
    body = [*tokenizer.encode(example.body).ids, END]
    ids, labels = (prompt + body)[:length], ([IGNORED] * len(prompt) + body)[:length]
    padding = length - len(ids)
    return ids + [END] * padding, labels + [IGNORED] * padding


def make_batches(tokenizer: Any, examples: list[Example], options: Options) -> list[Batch]:
    """(ids, labels) of each step, both (batch, length) int64."""
    rows = (encode(tokenizer, example, options.length) for example in examples)
    useful = [row for row in rows if any(label != IGNORED for label in row[1])]
    if not useful:
        raise SystemExit(f"No function whose prompt is shorter than {options.length} tokens: raise --length")
    wanted = [useful[i % len(useful)] for i in range(options.steps * options.batch)]
    pairs = torch.tensor(wanted, device=options.device).view(options.steps, options.batch, 2, options.length)
    return [(pair[:, 0], pair[:, 1]) for pair in pairs]


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


def train(name: str, loss_function: Callable[..., Tensor] | None, batches: list[Batch], options: Options) -> Run:
    """Trains a fresh model with the loss (None: the model's own), which is measured apart from the model."""
    from tqdm import tqdm

    device = torch.device(options.device)
    model = make_model(options)
    loss_function = loss_function or model.loss_function
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Position t predicts label t + 1, so that a row's first label counts for nothing.
    kept = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches)
    result = Run(name, kept, sum(labels.numel() for _, labels in batches) - kept)
    for step, (ids, labels) in enumerate(progress := tqdm(batches, desc=name, unit="step"), start=1):
        # No attention mask: the padding is on the right, where causal attention does not look.
        logits = model(input_ids=ids, use_cache=False).logits
        leaf = logits.detach().requires_grad_()
        measured = step % MEMORY_EVERY == 0 or step == len(batches)
        with PeakMemory(device) if measured else nullcontext() as peak:
            loss, seconds = differentiate(loss_function, leaf, labels)
        assert leaf.grad is not None
        if peak is not None and peak.bytes is not None:
            result.peaks.append(max(0, peak.bytes - leaf.grad.nbytes))
        result.losses.append(loss)
        result.seconds.append(seconds)
        logits.backward(leaf.grad)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return result


def differentiate(loss_function: Callable[..., Tensor], leaf: Tensor, labels: Tensor) -> tuple[float, float]:
    """Leaves the gradient in `leaf.grad`; returns the loss and the seconds that both took.

    The loss does not outlive the call: its graph holds the leaf, which would be freed while the next is measured.
    """
    start = clock(leaf.device)
    loss = loss_function(logits=leaf, labels=labels, vocab_size=leaf.shape[-1])
    loss.backward()
    seconds = clock(leaf.device) - start
    return loss.item(), seconds


LEGEND = """
final loss, last 20   nats per kept token: the last step's, and the mean of the last 20 steps
kept, ignored         positions trained on, and positions with label -100 (prompt and padding), of all steps
loss s, ms/step       forward and backward of the loss alone, logits to their gradient: all steps, median step
peak MiB              memory that the loss takes beside the logits and their gradient: largest of the steps measured
"""


def table(plain: Run, fused: Run) -> str:
    """One row per run, and one of the ratios of what they cost."""
    rows: list[tuple[str, ...]] = [("run", "final loss", "last 20", "kept", "ignored", "loss s", "ms/step", "peak MiB")]
    for run in (plain, fused):
        losses = f"{run.losses[-1]:.4f}", f"{statistics.fmean(run.losses[-20:]):.4f}"
        rows.append((run.name, *losses, f"{run.kept}", f"{run.ignored}", *map(_cell, costs(run))))
    ratios = (a / b if b else math.nan for a, b in zip(costs(plain), costs(fused), strict=True))
    rows.append(("plain / fused", "", "", "", "", *map(_cell, ratios)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def costs(run: Run) -> tuple[float, float, float]:
    """Seconds of all steps, milliseconds of the median step, MiB; NaN for what could not be measured."""
    return sum(run.seconds), 1e3 * statistics.median(run.seconds), max(run.peaks, default=math.nan) / 2**20


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def draw(plain: Run, fused: Run, out: Path) -> None:
    """Saves both curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(plain.losses, color="tab:gray", linewidth=3, alpha=0.6, label="plain (transformers)")
    axes.plot(fused.losses, color="tab:red", linewidth=1.2, linestyle="--", label="fused")
    axes.set(xlabel="step", ylabel="loss (nats per kept token)", title="The same training run with either loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
