"""The docstrings' examples run as they stand, and every option is explained."""

import doctest
import inspect
import re

import fused_ignore_ce.causal_lm
import fused_ignore_ce.collator
import fused_ignore_ce.functional
import fused_ignore_ce.linear.cross_entropy
import fused_ignore_ce.linear.log_probs
import fused_ignore_ce.modules
import pytest
import torch

import fused_ignore_ce.deferred.logits
import fused_ignore_ce.linear.plan

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
