"""The docstrings' examples run as they stand, and every option is explained."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import fused_ignore_ce

PACKAGE = Path(fused_ignore_ce.__file__).parent
MODULES = sorted(
    ".".join(["fused_ignore_ce", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in PACKAGE.rglob("*.py")
    if "kernels" not in path.relative_to(PACKAGE).parts
    and any(">>> " in line and "+SKIP" not in line for line in path.read_text().splitlines())
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    names = {**vars(module), "torch": torch}
    assert doctest.testmod(module, extraglobs=names).failed == 0
    assert doctest.testmod(module, extraglobs=names).attempted > 0


@pytest.mark.parametrize("name", ["fused_cross_entropy", "fused_linear_cross_entropy", "plan_linear_loss"])
def test_every_option_is_in_the_docstring(name):
    function = getattr(fused_ignore_ce, name)
    for option in inspect.signature(function).parameters:
        assert re.search(rf"^ {{8}}{option}:", inspect.getdoc(function).replace("\n", "\n    "), re.MULTILINE), option
