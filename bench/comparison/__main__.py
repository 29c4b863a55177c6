"""Compares the packages that are installed, on a CPU, in about a minute: `python -m bench.comparison [--out DIR]`.

Prints the tables and writes DIR/comparison-<date>.json, from which the pages are written. `--torch PYTHON` adds
PyTorch's answers with the release that another interpreter has; it may be given several times.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def main() -> int:
    from bench import machine

    from . import running
    from .rows import SOURCES

    parser = machine.parser("bench.comparison", __doc__)
    parser.add_argument(
        "--torch", action="append", default=[], metavar="PYTHON", help="an interpreter with another torch"
    )
    parser.add_argument("--only", metavar="PACKAGE", help="ask one package only, and print no table")
    options = parser.parse_args()
    header = machine.header(["--torch", "PYTHON"] * len(options.torch), "bench.comparison")
    result = {"header": header, "sources": SOURCES, "cells": list(running.cells(only=options.only))}
    result["other torch"] = [running.elsewhere(interpreter) for interpreter in options.torch]
    path = machine.write(options.out / f"comparison-{header['date']}.json", result)
    if options.only is None:
        from . import tables

        print(tables.long(path.stem, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
