"""The README's snippets and the docstrings' examples run as they stand."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import fused_ignore_ce.functional
import fused_ignore_ce.modules

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(code):
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["loss"].isfinite() if "loss" in scope else "model" in scope


@pytest.mark.parametrize("module", [fused_ignore_ce.functional, fused_ignore_ce.modules], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    names = {**vars(module), "torch": torch}
    assert doctest.testmod(module, extraglobs=names).failed == 0
    assert doctest.testmod(module, extraglobs=names).attempted > 0


def test_every_option_is_in_the_docstring():
    import inspect

    function = fused_ignore_ce.fused_cross_entropy
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^ {{8}}{name}:", inspect.getdoc(function).replace("\n", "\n    "), re.MULTILINE), name
