"""The examples' data: functions of Python's standard library, with signatures as prompts and bodies as completions."""

import ast
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

IGNORED = -100  # the label of tokens that no loss counts


def _functions() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno < 40:
                signature, newline, body = "\n".join(lines[node.lineno - 1 : node.end_lineno]).partition("\n")
                yield signature.strip(), newline + body


def functions(count: int = 600) -> list[tuple[str, str]]:
    """(signature, body) of short functions. Tokens never span both, since a body begins with a line break."""
    return list(itertools.islice(_functions(), count))


def tokenized(tokenizer: Any, length: int = 64, padding_label: int = IGNORED) -> list[dict[str, list[int]]]:
    """The functions as rows of equal length. The labels of prompts are ignored."""
    rows = []
    for prompt, body in functions():
        head = tokenizer(prompt, add_special_tokens=False).input_ids[: length // 2]
        ids = (head + tokenizer(body, add_special_tokens=False).input_ids)[:length]
        padding = length - len(ids)
        rows.append(
            {
                "input_ids": ids + [tokenizer.pad_token_id] * padding,
                "labels": [IGNORED] * len(head) + ids[len(head) :] + [padding_label] * padding,
                "attention_mask": [1] * len(ids) + [0] * padding,
            }
        )
    return rows


def batches(rows: list[dict[str, list[int]]], size: int, device: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of tensors."""
    endless = itertools.cycle(rows)
    while True:
        batch = list(itertools.islice(endless, size))
        yield {name: torch.tensor([row[name] for row in batch], device=device) for name in batch[0]}
