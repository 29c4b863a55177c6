"""`python -m tests.deferred.fuzz --programs 20000 --seed 1`: many random programs, a tally, and small failures."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
import warnings
from collections import Counter

import torch

from .programs import Program
from .search import NOT_RAISED, RAISED, RIGHT, WRONG, Failure, drawn, smallest, verdict_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.deferred.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000, help="how many programs (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="program i is that of seed * 1000000 + i (default: 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many minutes")
    parser.add_argument("--failures", type=int, default=40, help="how many failures to make small (default: 40)")
    parser.add_argument("--without", default="", help="kinds of statements to leave out, separated by commas")
    parser.add_argument("--only", type=int, help="run the program of one seed (as printed), and print it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # programs make PyTorch warn, patched or not; that is not compared
    torch.set_num_threads(1)
    without = [kind.strip() for kind in args.without.split(",") if kind.strip()]
    if args.only is not None:
        program, plain = drawn(args.only, without)
        failure = Failure(program, verdict_of(program, plain=plain))
        print(failure)
        return int(not failure.verdict.right)
    gc.collect()
    gc.freeze()
    return _search(args, without)


def _search(args: argparse.Namespace, without: list[str]) -> int:
    started = time.monotonic()
    tally: Counter[str] = Counter()
    clusters: dict[tuple[str, frozenset[str]], tuple[int, Failure, int]] = {}
    unsorted: Counter[str] = Counter()
    made_small = 0
    for i in range(args.programs):
        if time.monotonic() - started > args.minutes * 60:
            break
        seed = args.seed * 1_000_000 + i
        faulthandler.dump_traceback_later(600, exit=True)
        print(f"\rprogram {i + 1}, seed {seed}", end="", file=sys.stderr, flush=True)  # names one that hangs or crashes
        program, plain = drawn(seed, without)
        verdict = verdict_of(program, plain=plain)
        tally[verdict.verdict] += 1
        if verdict.right:
            continue
        key = None
        if made_small < args.failures:
            made_small += 1
            small = smallest(Failure(program, verdict))
            key = _known(small.program, verdict.verdict, clusters)
            if key is None:
                key = verdict.verdict, small.program.kinds
                clusters[key] = seed, small, 0
                print(f"\n--- after {i + 1} programs, seed {seed} ---\n{small}", flush=True)
        else:
            key = _known(program, verdict.verdict, clusters)
        if key is None:
            unsorted[verdict.verdict] += 1
        else:
            first, small, count = clusters[key]
            clusters[key] = first, small, count + 1
    faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - started
    print(
        f"\n{tally.total()} programs in {seconds:.0f} s: "
        + ", ".join(f"{tally[v]} {v}" for v in (RIGHT, WRONG, RAISED, NOT_RAISED))
    )
    for (how, kinds), (first, _, count) in sorted(clusters.items(), key=lambda item: -item[1][2]):
        print(f"{count:6} {how}: {', '.join(sorted(kinds))} (first: seed {first})")
    for how, count in unsorted.items():
        print(f"{count:6} {how}: not made small")
    return int(tally[RIGHT] != tally.total())


def _known(
    program: Program, verdict: str, clusters: dict[tuple[str, frozenset[str]], tuple[int, Failure, int]]
) -> tuple[str, frozenset[str]] | None:
    """The kind of failure whose statements the program has, too: the one with the most statements."""
    fits = [key for key in clusters if key[0] == verdict and key[1] <= program.kinds]
    return max(fits, key=lambda key: len(key[1]), default=None)


if __name__ == "__main__":
    sys.exit(main())
