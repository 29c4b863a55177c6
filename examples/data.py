"""The examples' data: functions of Python's standard library, with signatures as prompts and bodies as completions."""

import ast
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

IGNORED = -100  # the label of tokens that count in no loss


def functions() -> Iterator[tuple[str, str]]:
    """(signature, body) of every short function."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno < 40:
                head, _, body = "\n".join(lines[node.lineno - 1 : node.end_lineno]).partition("\n")
                yield head + "\n", body


def texts_and_tokenizer(*special: str, count: int = 600) -> tuple[list[tuple[str, str]], ByteLevelBPETokenizer]:
    """The first functions, and a tokenizer of 2048 tokens trained on them; special tokens have the first ids."""
    texts = list(itertools.islice(functions(), count))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        itertools.chain(*texts), vocab_size=2048, special_tokens=list(special), show_progress=False
    )
    return texts, tokenizer


def encode(
    tokenizer: ByteLevelBPETokenizer, prompt: str, body: str, length: int, padding_label: int = IGNORED
) -> dict[str, list[int]]:
    """One row of a batch, padded with token 0. The labels of the prompt are ignored."""
    head = tokenizer.encode(prompt).ids[: length // 2]
    ids = (head + tokenizer.encode(body).ids)[:length]
    padding = length - len(ids)
    return {
        "input_ids": ids + [0] * padding,
        "labels": [IGNORED] * len(head) + ids[len(head) :] + [padding_label] * padding,
        "attention_mask": [1] * len(ids) + [0] * padding,
    }
