"""Runs the sweep and writes its tables.

    python -m tests.transformers_coverage [--only REGEX] [--mapping NAME] [--out docs/transformers-coverage.md]

Every class has a process of its own, with a timeout, so that a crash or a hang is only a row of the table. The exit
status is 1 if a class differs, or if less than 95% of the generating classes that run take the linear way.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto import modeling_auto

from .compare import FAILED, LINEAR, LOGITS, RULE, SMOOTHING, UNTOUCHED, Outcome
from .isolation import isolated

MAPPINGS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "MULTIPLE_CHOICE", "QUESTION_ANSWERING",
)  # fmt: skip
GENERATING, ENOUGH = MAPPINGS[:3], 0.95


def classes(mapping: str) -> list[str]:
    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    return sorted({name for value in names for name in ([value] if isinstance(value, str) else value)})


def sweep(only: str, mappings: tuple[str, ...], jobs: int) -> list[Outcome]:
    wanted = [(m, name) for m in mappings for name in classes(m) if re.search(only, name)]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(isolated, *each) for each in wanted]
        for _ in tqdm(as_completed(futures), total=len(futures), unit="class", disable=None):
            pass
    return [future.result() for future in futures]


def document(outcomes: list[Outcome], seconds: float) -> str:
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    lines = [
        "# `patch_model` on every class of transformers",
        "",
        f"Written by `python -m tests.transformers_coverage` in {seconds / 60:.0f} minutes; {versions}, CPU, {today}.",
        "",
        "Each class that the auto-mappings name is built tiny with random weights and trained for one step with and",
        "without `patch_model`, on the same batch, some of whose labels are ignored.",
        "",
        f"Equal: {RULE}",
        "",
        f"- {LINEAR}: the loss came from hidden states and head; no logits were computed, forward or backward.",
        f"- {LOGITS}: the loss was `fused_cross_entropy` of logits that were there.",
        f"- {UNTOUCHED}: the model's own loss.",
        f"- {FAILED}: the class did not run, patched or not.",
        "",
        "Loss outside, of causal models: the model gets no labels, and the loss is `F.cross_entropy` of its logits",
        "after the forward. Equal means what it means above; fused, that no logits were computed.",
        "",
        f"Option: the model is patched with `label_smoothing={SMOOTHING}`. Its loss and gradients are those of the",
        "plain model whose cross entropies are smoothed, or the forward is an error.",
        "",
        f"| mapping | classes | run | equal | {LINEAR} | {LOGITS} | {UNTOUCHED} | {FAILED} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.mapping].append(outcome)
    for mapping, group in groups.items():
        ran = [o for o in group if o.how != FAILED]
        counts = (sum(o.how == how for o in group) for how in (LINEAR, LOGITS, UNTOUCHED, FAILED))
        cells = (mapping, len(group), len(ran), sum(not o.difference for o in ran), *counts)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for mapping, group in groups.items():
        lines += [
            "",
            f"## {mapping}",
            "",
            "| class | equal | how | why | loss outside | option |",
            "|---|---|---|---|---|---|",
        ]
        for o in group:
            equal = "" if o.how == FAILED else f"no: {o.difference}" if o.difference else "yes"
            lines.append(f"| {o.name} | {equal} | {o.how} | {o.why} | {o.outside} | {o.option} |")
    return "\n".join(lines) + "\n"


def failures(outcomes: list[Outcome]) -> list[str]:
    found = [f"{o.name} ({o.mapping}) differs: {o.difference}" for o in outcomes if o.difference]
    for mapping in GENERATING:
        group = [o for o in outcomes if o.mapping == mapping]
        ran = [o for o in group if o.how != FAILED]
        linear = sum(o.how == LINEAR for o in ran)
        if group and not ran:
            found.append(f"{mapping}: no class was built")
        elif linear < ENOUGH * len(ran):
            found.append(f"{mapping}: {linear} of {len(ran)} classes take the linear way, fewer than {ENOUGH:.0%}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.transformers_coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="classes whose name it is found in")
    parser.add_argument("--mapping", action="append", choices=MAPPINGS, help="one mapping; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE", help="markdown; without it, standard output")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    given = parser.parse_args()
    started = time.perf_counter()
    outcomes = sweep(given.only, tuple(given.mapping or MAPPINGS), given.jobs)
    if not outcomes:
        parser.error(f"--only: no class's name has {given.only!r} in it")
    text = document(outcomes, time.perf_counter() - started)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
    else:
        print(text)
    found = failures(outcomes)
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
