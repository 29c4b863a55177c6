"""Imports packages that only an extra installs: if one is missing, the error names the extra."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """The module; if it is not installed, an error that says which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module:  # it is installed, but something that it imports is not
            raise
        raise ModuleNotFoundError(
            f"{module}: needed here and not installed; pip install 'fused_ignore_ce[{extra}]'", name=module
        ) from e
