"""Reads the project's metadata and version from the repository's files."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def metadata(root: Path = ROOT) -> dict[str, Any]:
    """The `[project]` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def version(root: Path = ROOT) -> str:
    """The package's `__version__`, read without importing it, so that a release needs no PyTorch."""
    source = (root / "fused_ignore_ce" / "__init__.py").read_text(encoding="utf-8")
    values = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__version__"]
    ]
    if len(values) != 1 or not isinstance(values[0], str):
        raise ValueError(f"fused_ignore_ce/__init__.py: expected one __version__, a string, got {values}")
    return values[0]
