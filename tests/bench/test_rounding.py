"""`python -m bench.rounding` measures errors of log-probabilities, and docs/concepts/loss.md has what it measured."""

import re

import pytest

from bench import rounding

from ..helpers.paths import ROOT

PAGE = (ROOT / "docs" / "concepts" / "loss.md").read_text()


@pytest.mark.parametrize("spread", rounding.SPREADS)
def test_the_page_has_what_is_measured(spread):
    """A smaller head and fewer tokens have errors of the same size."""
    row = re.search(rf"^\| {spread:.0f} \| .*$", PAGE, re.MULTILINE)[0]
    low, high, largest, unrounded = map(float, re.findall(r"\d[.\d]*e-\d", row))
    found = rounding.errors(32768, 512, spread, tokens=32)
    assert low / 2 < found["rounded, median"] < 2 * high
    assert found["rounded, largest"] < 2 * largest
    assert found["unrounded, largest"] < 2 * unrounded


def test_the_page_names_the_heads_and_tokens():
    for classes, features in rounding.HEADS:
        assert f"{classes} x {features}" in PAGE
    assert f"against float64 of the same bfloat16 operands: {rounding.TOKENS}\ntokens" in PAGE
