"""Train a small language model twice on Python's own sources: with transformers' loss, and with the fused one."""

from __future__ import annotations

import ast
import importlib.util
import random
import statistics
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .causal_lm import fused_causal_lm_loss
from .measure import PeakMemory

IGNORED = -100
#: Id of the token that ends a function and pads a row.
END = 0
#: Folders of the standard library that hold tests, tables, or other people's code.
SKIPPED = {"test", "tests", "idlelib_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"}
#: Functions that the tokenizer is trained on, at least.
TOKENIZER_FUNCTIONS = 4000
#: Memory is measured every so many steps: giving the heap back to the system before it costs the next step time.
MEMORY_EVERY = 10
#: Nats. The two losses round differently in float32, and training amplifies that: some 1e-4 after 300 steps. A
#: wrong gradient moves the curve by 1e-1.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Options:
    """What to train, on what, and where the picture goes."""

    steps: int = 300
    batch: int = 4
    length: int = 256
    vocab: int = 8192
    hidden: int = 96
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
    losses: list[float]
    kept: int
    ignored: int
    seconds: list[float]
    peaks: list[int]


def run(options: Options) -> int:
    """Trains both models, prints the table, saves the picture; returns 1 if the curves differ."""
    _require("transformers", "tokenizers", "tqdm", "matplotlib")
    wanted = options.steps * options.batch
    examples = list(islice(functions(options.seed), max(wanted, min(wanted * 10, TOKENIZER_FUNCTIONS))))
    random.Random(options.seed).shuffle(examples)
    tokenizer = train_tokenizer(examples, options.vocab)
    batches = make_batches(tokenizer, examples, options)
    print(
        f"{len(examples)} functions of Python's standard library; {len(batches)} steps of {options.batch} x "
        f"{options.length} tokens, vocabulary {tokenizer.get_vocab_size()}, float32, on {options.device}"
    )
    plain = train("plain", None, tokenizer.get_vocab_size(), batches, options)
    fused = train("fused", fused_causal_lm_loss, tokenizer.get_vocab_size(), batches, options)
    print(table(plain, fused))
    draw(plain, fused, options.out)
    difference = max(abs(a - b) for a, b in zip(plain.losses, fused.losses, strict=True))
    same = difference <= TOLERANCE
    print(f"\nLargest difference between the curves: {difference:.1e} nats, {'within' if same else 'ABOVE'} {TOLERANCE}")
    print(f"Both curves: {options.out}")
    return 0 if same else 1


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"The demo needs {', '.join(missing)}: pip install 'fused_ignore_ce[hf]'")


def functions(seed: int) -> Iterator[Example]:
    """The functions of the standard library, its files in random order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    for path in files:
        yield from split_functions(path.read_text(encoding="utf-8", errors="ignore"))


def split_functions(source: str) -> Iterator[Example]:
    """Every function: its signature and docstring as the prompt, the statements after them as the body."""
    lines = source.splitlines(keepends=True)
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
        prompt, body = "".join(lines[node.lineno - 1 : begin]), "".join(lines[begin : node.end_lineno])
        whole = textwrap.dedent(prompt + body)
        cut = len("".join(whole.splitlines(keepends=True)[: begin - node.lineno + 1]))
        yield Example(whole[:cut], whole[cut:])


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


def make_batches(tokenizer: Any, examples: list[Example], options: Options) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each step, both (batch, length) int64."""
    rows = (encode(tokenizer, example, options.length) for example in examples)
    useful = [row for row in rows if row[1][-1] != IGNORED or any(label != IGNORED for label in row[1])]
    wanted = [useful[i % len(useful)] for i in range(options.steps * options.batch)]
    pairs = torch.tensor(wanted, device=options.device).view(options.steps, options.batch, 2, options.length)
    return [(pair[:, 0], pair[:, 1]) for pair in pairs]


def make_model(vocab: int, options: Options) -> Any:
    """A Llama of two layers with random weights, the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=options.length,
        bos_token_id=END,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).to(options.device)


def train(
    name: str,
    loss_function: Callable[..., Tensor] | None,
    vocab: int,
    batches: list[tuple[Tensor, Tensor]],
    options: Options,
) -> Run:
    """Trains a fresh model with the loss (None: the model's own), which is measured apart from the model."""
    from tqdm import tqdm

    device = torch.device(options.device)
    model = make_model(vocab, options)
    loss_function = loss_function or model.loss_function
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    result = Run(name, [], 0, 0, [], [])
    progress = tqdm(batches, desc=name, unit="step")
    for step, (ids, labels) in enumerate(progress):
        # No attention mask: the padding is on the right, where causal attention does not look.
        logits = model(input_ids=ids, use_cache=False).logits
        leaf = logits.detach().requires_grad_()
        with PeakMemory(device) if step % MEMORY_EVERY == MEMORY_EVERY - 1 else nullcontext() as peak:
            loss, seconds = differentiate(loss_function, leaf, labels)
        assert leaf.grad is not None
        if peak is not None and peak.bytes is not None:
            result.peaks.append(peak.bytes - leaf.grad.nbytes)
        logits.backward(leaf.grad)
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(loss)
        result.seconds.append(seconds)
        kept = int((labels[:, 1:] != IGNORED).sum())  # the first label of a row has no logits before it
        result.kept += kept
        result.ignored += labels.numel() - kept
        progress.set_postfix(loss=f"{result.losses[-1]:.3f}", refresh=False)
    return result


def differentiate(loss_function: Callable[..., Tensor], leaf: Tensor, labels: Tensor) -> tuple[float, float]:
    """Leaves the gradient in `leaf.grad`; returns the loss and the seconds that both took.

    The loss does not outlive the call: its graph holds the leaf, which would be freed while the next is measured.
    """
    start = _clock(leaf.device)
    loss = loss_function(logits=leaf, labels=labels, vocab_size=leaf.shape[-1])
    loss.backward()
    return loss.item(), _clock(leaf.device) - start


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(plain: Run, fused: Run) -> str:
    """One row per run and one of ratios, under a legend that says what the columns hold."""
    columns = ("run", "final loss", "last 20", "kept", "ignored", "loss s", "ms/step", "peak MiB")
    rows = [columns]
    for r in (plain, fused):
        numbers = f"{r.losses[-1]:.4f}", f"{statistics.fmean(r.losses[-20:]):.4f}", f"{r.kept}", f"{r.ignored}"
        rows.append((r.name, *numbers, f"{sum(r.seconds):.2f}", f"{_ms(r):.1f}", _mib(r)))
    ratios = (_ratio(f(plain), f(fused)) for f in (lambda r: sum(r.seconds), _ms, _peak))
    rows.append(("plain / fused", "", "", "", "", *ratios))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join((LEGEND, "", *lines))


LEGEND = """
final loss, last 20   nats per kept token: the last step's, and the mean of the last 20 steps
kept, ignored         positions that were trained on, and those with label -100 (prompt and padding), of all steps
loss s, ms/step       forward and backward of the loss alone, logits to their gradient: all steps, median step
peak MiB              memory that the loss takes beside the logits and their gradient: median of the measured steps"""


def _ms(run: Run) -> float:
    return 1e3 * statistics.median(run.seconds)


def _peak(run: Run) -> float:
    return statistics.median(run.peaks) / 2**20 if run.peaks else 0.0


def _mib(run: Run) -> str:
    return f"{_peak(run):.1f}" if run.peaks else "n/a"


def _ratio(plain: float, fused: float) -> str:
    return f"{plain / fused:.2f}x" if fused else "n/a"


def draw(plain: Run, fused: Run, out: Path) -> None:
    """Saves both curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(plain.losses, color="tab:gray", linewidth=3, alpha=0.6, label="plain (transformers)")
    axes.plot(fused.losses, color="tab:red", linewidth=1.2, linestyle="--", label="fused")
    axes.set(xlabel="step", ylabel="loss (nats per kept token)", title="The same training run with either loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
