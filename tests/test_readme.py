"""The README's snippets and the docstrings' examples run as they stand."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import fused_ignore_ce.causal_lm
import fused_ignore_ce.collator
import fused_ignore_ce.deferred.logits
import fused_ignore_ce.functional
import fused_ignore_ce.linear.cross_entropy
import fused_ignore_ce.linear.log_probs
import fused_ignore_ce.linear.plan
import fused_ignore_ce.modules

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 4


@pytest.fixture(autouse=True)
def _no_process_group_remains():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(code):
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["loss"].isfinite() if "loss" in scope else "model" in scope


def test_what_the_first_snippet_prints(capsys):
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    assert f"```text\n{capsys.readouterr().out}```" in README


MODULES = [
    fused_ignore_ce.causal_lm,
    fused_ignore_ce.collator,
    fused_ignore_ce.deferred.logits,
    fused_ignore_ce.functional,
    fused_ignore_ce.modules,
    fused_ignore_ce.linear.cross_entropy,
    fused_ignore_ce.linear.log_probs,
    fused_ignore_ce.linear.plan,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_examples(module):
    names = {**vars(module), "torch": torch}
    assert doctest.testmod(module, extraglobs=names).failed == 0
    assert doctest.testmod(module, extraglobs=names).attempted > 0


@pytest.mark.parametrize("name", ["fused_cross_entropy", "fused_linear_cross_entropy", "plan_linear_loss"])
def test_every_option_is_in_the_docstring(name):
    function = getattr(fused_ignore_ce, name)
    for option in inspect.signature(function).parameters:
        assert re.search(rf"^ {{8}}{option}:", inspect.getdoc(function).replace("\n", "\n    "), re.MULTILINE), option
