"""Executes what Triton compiles for every architecture: PyTorch's samples, known hazards and 330 random cases on each.

    python -m tests.architectures [--arch 90] [--processes 2] [-k EXPRESSION]

It prints a line for each architecture, and the failures. Triton keeps what it compiled, so that a second run, or the
rest of one that was ended, is faster. The exit status is 1 if a test failed.
"""

import argparse
import os
import subprocess
import sys

from bench.proofs.emulator.launching import SHARED

from .helpers.paths import ROOT, TESTS

FILES = ["kernels/test_random_cases.py", "logits/test_hazards.py", "linear/test_hazards.py"]


def run(arch, processes, chosen):
    """(whether all tests passed, what pytest says)."""
    chosen = f"triton and ({chosen})" if chosen else "triton"
    command = ["-m", "pytest", "-n", str(processes), "--dist", "worksteal", "-p", "no:cacheprovider"]
    command += ["-k", chosen, *(str(TESTS / name) for name in FILES)]
    environment = os.environ | {"TEST_COMPILED": str(arch)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=SHARED, help="may be repeated")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many run tests at a time")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only these tests, as pytest's -k")
    options = parser.parse_args()
    failed = False
    for arch in options.arch or SHARED:
        right, said = run(arch, options.processes, options.k)
        print(f"sm_{arch}: {said.strip().splitlines()[-1].strip('= ')}", flush=True)
        if not right:
            failed = True
            print(said, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
