"""The Triton backend is an error that says what to do where its kernels cannot run."""

import re
import sys

import pytest
import torch

from fused_ignore_ce import fused_cross_entropy
from fused_ignore_ce.backends import choice

X = torch.randn(3, 5)
Y = torch.tensor([1, 2, -100])


@pytest.fixture
def _first_use():
    """The Triton backend is looked up once per process. This clears its cache before the test and after it."""
    choice._triton.cache_clear()
    yield
    choice._triton.cache_clear()


@pytest.mark.usefixtures("_first_use")
def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    from fused_ignore_ce.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        fused_cross_entropy(X, Y, backend="triton")


@pytest.mark.usefixtures("_first_use")
def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_ignore_ce.kernels", None)
    with pytest.raises(RuntimeError, match=re.escape('backend="torch"')):
        fused_cross_entropy(X, Y, backend="triton")
    assert fused_cross_entropy(X, Y).isfinite()
