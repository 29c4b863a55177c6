"""Compares the packages that are installed, on a CPU, in about a minute: `python -m bench.comparison [--out DIR]`.

Prints the tables and writes DIR/comparison-<date>.json, from which the pages are written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def main() -> int:
    from bench import machine
    from bench.speed.providers import version

    from . import running, tables
    from .peers import PACKAGES
    from .rows import SOURCES

    parser = argparse.ArgumentParser(prog="python -m bench.comparison", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results", help="where the file goes")
    options = parser.parse_args()
    header = machine.header(sys.argv[1:], "bench.comparison")
    header["versions"] |= {name: found for name in PACKAGES.values() if (found := version(name))}
    result = {"header": header, "sources": SOURCES, "cells": list(running.cells())}
    path = options.out / f"comparison-{header['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(tables.long(path.stem, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
