"""Code in a process of its own."""

import subprocess
import sys
from pathlib import Path

from .paths import ROOT


def python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    """What a new process prints that runs the code."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()
