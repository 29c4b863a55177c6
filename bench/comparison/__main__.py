"""Compares the packages that are installed, on a CPU, in about a minute: `python -m bench.comparison [--out DIR]`.

Prints the tables and writes DIR/comparison-<date>.json, from which the pages are written.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def main() -> int:
    from bench import machine

    from . import running, tables
    from .rows import SOURCES

    options = machine.parser("bench.comparison", __doc__).parse_args()
    header = machine.header(sys.argv[1:], "bench.comparison")
    result = {"header": header, "sources": SOURCES, "cells": list(running.cells())}
    path = machine.write(options.out / f"comparison-{header['date']}.json", result)
    print(tables.long(path.stem, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
