"""The one pass that keeps its row on the chip: right whatever the row, and a logit is read once where the row fits."""

import os

import pytest

pytest.importorskip("triton")

from ..bench.test_proofs_compiled import worker
from ..helpers import on_chip


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    return worker("selection", tmp_path_factory.mktemp("cache"), "on_chip.py")


def test_a_selection_is_right(selection):
    assert len(selection) == len(on_chip.SELECTION)
    assert {name for name, *_ in selection.values()} == {"on_chip_kernel"}


def test_every_logit_is_written_once(selection):
    for _, _, written in selection.values():
        assert 1.0 <= written < 1.005


def test_ignored_rows_are_not_read(selection):
    """Of seven rows, one is ignored. Every thread reads the target's logit besides."""
    first, *_ = on_chip.SELECTION
    [read] = [read for name, (_, read, _) in selection.items() if f"V{first.V}" in name]
    assert 1.0 <= read < 1.02


def test_a_long_row_is_read_once(tmp_path):
    """At V = 128,256, with an ignored row between two kept ones. Every thread reads the target's logit besides."""
    [(name, read, written)] = worker("large", tmp_path, "on_chip.py")
    assert name == "on_chip_kernel"
    assert 1.0 <= read < 1.005
    assert 1.0 <= written < 1.0001


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not run Gluon")
@pytest.mark.parametrize("case", on_chip.MORE, ids=str)
def test_every_option_whatever_the_row(case, device):
    on_chip.check(case, device)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not run Gluon")
@pytest.mark.parametrize("case", on_chip.TUNED, ids=lambda case: "-".join(map(str, case.program.__dict__.values())))
def test_programs_of_a_table(case, device):
    on_chip.check(case, device)
