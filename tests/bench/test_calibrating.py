"""The model of kernels against published times, and the search for its constants."""

import dataclasses
import re
import statistics

import pytest

pytest.importorskip("triton")
pytest.importorskip("tabulate")

from bench.machine import ROOT
from bench.proofs import calibrating, predicting, published
from bench.proofs.calibrating import FITTED, Model


def test_predictions_hold_for_published_times():
    """Each is within 15%, half of them are within 8%, and what is printed above predictions says by how much."""
    errors = [abs(FITTED.error(each)) for each in calibrating.shown()]
    assert len(errors) == len(published.SHOWN)
    assert max(errors) < 0.15
    assert statistics.median(errors) < 0.08
    assert re.findall(r"[\d.]+%", predicting.NOTE) == re.findall(r"[\d.]+%", calibrating.summary(errors))


def test_the_page_names_the_constants():
    page = (ROOT / "docs" / "concepts" / "proofs.md").read_text()
    constants = FITTED.constants
    for text in (f"({constants.stream})", f"({constants.cache})", f"({constants.wait * 1e6:.2f} µs)"):
        assert text in page


def test_errors_are_beside_predictions():
    printed = predicting.tables([])
    assert printed.startswith(predicting.NOTE)
    assert all(each.row.source in printed for each in calibrating.shown())
    assert printed.count("ms") >= 2


def test_every_series_is_whole():
    every = list(published.rows())
    assert len({(row.series, row.N, row.V) for row in every}) == len(every)
    assert all(row.milliseconds > 0 for row in every)


@pytest.fixture
def invented():
    """Times that follow exactly from other constants. No row of these needs the cache."""
    wanted = Model(dataclasses.replace(FITTED.constants, stream=0.8, wait=9e-7), h100=2e-4, b200=4e-4)
    rows = [each for each in calibrating.samples() if each.row.V == 32000 and each.row.itemsize == 2]
    rows += [each for each in calibrating.samples() if each.row.kernel.walks == 1]
    return wanted, [
        dataclasses.replace(each, row=dataclasses.replace(each.row, milliseconds=1e3 * wanted.seconds(each)))
        for each in rows
    ]


def test_constants_are_found(invented, monkeypatch):
    wanted, known = invented
    monkeypatch.setattr(calibrating, "CACHES", [FITTED.constants.cache])
    found = calibrating.fit(known)
    assert found.constants.stream == pytest.approx(wanted.constants.stream, rel=0.02)
    assert found.constants.wait == pytest.approx(wanted.constants.wait, rel=0.05)
    assert (found.h100, found.b200) == pytest.approx((wanted.h100, wanted.b200), rel=0.05)
    assert max(abs(found.error(each)) for each in known) < 0.01


def test_a_series_that_is_left_out_is_not_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(calibrating, "fit", lambda known: seen.append(known) or FITTED)
    for name, known in zip(calibrating.left_out(), seen, strict=True):
        assert name not in {each.row.series for each in known}
        assert len(known) + sum(each.row.series == name for each in calibrating.samples()) == len(calibrating.samples())
