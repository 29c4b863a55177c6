"""The demo's data: functions of Python's standard library, a tokenizer trained on them, and batches of tokens."""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

IGNORED = -100
#: Id of the token that ends a function and pads a row.
END = 0
#: Folders of the standard library that hold tests, tables, or other people's code.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "site-packages", "dist-packages"}


class Example(NamedTuple):
    """A function's source in two parts: the prompt is given, the body is learnt."""

    prompt: str
    body: str


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


def make_batches(
    tokenizer: Any, examples: list[Example], *, steps: int, batch: int, length: int, device: str
) -> list[Batch]:
    """(ids, labels) of each step, both (batch, length) int64."""
    rows = (encode(tokenizer, example, length) for example in examples)
    useful = [row for row in rows if any(label != IGNORED for label in row[1])]
    if not useful:
        raise SystemExit(f"--length: expected more tokens than the shortest prompt has, got {length}; raise it")
    wanted = [useful[i % len(useful)] for i in range(steps * batch)]
    pairs = torch.tensor(wanted, device=device).view(steps, batch, 2, length)
    return [(pair[:, 0], pair[:, 1]) for pair in pairs]
