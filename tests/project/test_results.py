"""Results that pages show say on what they were measured: a commit of this history, without changes, and versions."""

import functools
import itertools
import re
import subprocess

import pytest

pytest.importorskip("matplotlib", reason="pip install 'fused_ignore_ce[bench]'")
pytest.importorskip("pandas", reason="pip install 'fused_ignore_ce[bench]'")
pytest.importorskip("tabulate", reason="pip install 'fused_ignore_ce[bench]'")

from bench import figures, reading
from bench.comparison import tables

from ..helpers.paths import ROOT
from ..helpers.snippets import PAGES, name_of

#: The front page shows nothing that was measured, compiled or compared before this day. Raise it to the day of the
#: newest results whenever a release changes the losses, the kernels or the packages that are compared, so that older
#: figures no longer tell what the release does. The day of a release alone is no reason.
FRONT_PAGE_SINCE = "2026-11-29"

#: What results call other packages that were run, and the distribution whose version has to be there.
RUN = {"Liger": "liger-kernel", "liger_kernel": "liger-kernel", "TRL": "trl", "trl": "trl", "CCE": "cut-cross-entropy"}

README = ROOT / "README.md"


class Recorded(reading.Results):
    """Result files, with the names of those that a page asked for."""

    def __init__(self):
        super().__init__()
        self.asked = set()

    def newest(self, command, section):
        name, result = super().newest(command, section)
        self.asked.add(name)
        return name, result

    def newest_proofs(self):
        name, result = super().newest_proofs()
        self.asked.add(name)
        return name, result


RESULTS = Recorded()
FILES = {name: result for results in RESULTS.files.values() for name, result in results.items()}


@functools.cache
def drawn():
    """The result files that each picture is of, found by the line that is drawn into it."""

    def of(about):
        return [name for name, it in FILES.items() if about in line_of(it["header"])]

    def line_of(header):
        return reading.heading(header), f"commit {header['commit'][:7]}"

    return {f"{picture}.png": of(about) for picture, (_, about) in figures.shown(RESULTS).items()}


@functools.cache
def shown_by(page):
    """The result files whose figures a page shows, in links, tables, sentences and pictures."""
    text = page.read_text()
    names = set(re.findall(r"bench/results/([\w-]+)\.json", text))
    assert names <= FILES.keys(), f"{name_of(page)} names result files that are not there: {names - FILES.keys()}"
    if page in figures.PAGES:
        RESULTS.asked.clear()
        figures.rewritten(page, text, RESULTS)
        names |= RESULTS.asked
        for picture in re.findall(r"pictures/([\w-]+\.png)", text):
            assert drawn()[picture], f"{picture} is of no result file"
            names |= {*drawn()[picture]}
    return names


PAGE = pytest.mark.parametrize("page", [page for page in PAGES if page in figures.PAGES], ids=name_of)


def headers(result):
    """A result's header, and that of the proofs in it."""
    return [part["header"] for part in (result, result.get("proofs") or {}) if "header" in part]


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


@functools.cache
def history():
    """The commits that led to the one that is checked out."""
    return {*git("rev-list", "HEAD")}


@PAGE
def test_results_are_of_commits_of_this_history_and_of_clean_trees(page):
    parts = [(name, header) for name in shown_by(page) for header in headers(FILES[name])]
    assert parts
    dirty = [name for name, header in parts if header["dirty"] is not False]
    assert not dirty, f"{name_of(page)} shows what was measured with uncommitted changes: {dirty}"
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the project has no .git, so there is no history to look commits up in")
    if git("rev-parse", "--is-shallow-repository") == ["true"]:
        pytest.skip("this clone is shallow, so there is not enough history to look commits up in")
    unknown = {name: header["commit"] for name, header in parts if header["commit"] not in history()}
    assert not unknown, f"{name_of(page)} shows what was measured on commits that are not in this history: {unknown}"


@PAGE
def test_results_name_the_versions_of_packages(page):
    for name in shown_by(page):
        result = FILES[name]
        ran = {"torch", "triton", "transformers"}
        for row in [*result.get("rows", []), *result.get("predictions, not measurements", [])]:
            words = re.findall(r"\w+", " ".join(str(row.get(key, "")) for key in ("provider", "loss", "kernel")))
            ran |= {RUN[word] for word in words if word in RUN}
        for header in headers(result):
            missing = [each for each in sorted(ran) if not re.match(r"\d+\.\d", header["versions"].get(each, ""))]
            assert not missing, f"{name} names no version of {missing}"


def test_the_front_page_shows_nothing_old():
    """If this fails, renew the results that it names, and run `make readme-figures`."""
    dates = {name: FILES[name]["header"]["date"] for name in shown_by(README)}
    dates[figures.COVERAGE.name] = re.search(r", CPU, (\S+)\.$", figures.COVERAGE.read_text(), re.MULTILINE)[1]
    old = {name: date for name, date in dates.items() if date < FRONT_PAGE_SINCE}
    assert not old, f"the front page shows figures from before {FRONT_PAGE_SINCE}: {old}"


def test_no_other_page_shows_results():
    """The tests above look at the pages that `bench.figures` writes."""
    others = [name_of(page) for page in PAGES if page not in figures.PAGES and shown_by(page)]
    assert not others


def columns(page):
    """The cells in the heads of a page's tables."""
    for head, rule in itertools.pairwise(page.read_text().splitlines()):
        if re.fullmatch(r"\|[\s:|-]+\|", rule) and head.startswith("|"):
            yield from (cell.strip() for cell in head.strip("|").split("|"))


@functools.cache
def versions():
    """Other packages, and their versions in the newest comparison: of PyTorch several, with slashes between them."""
    _, result = RESULTS.newest("comparison", "cells")
    return {package: version for package, (version, _) in result["sources"].items()} | {
        "PyTorch": " / ".join(tables.releases(result))
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_columns_about_other_packages_name_the_versions_that_were_compared(page):
    wrong = [
        f"{cell!r}, not {package} {version}"
        for cell in columns(page)
        for package, version in versions().items()
        if re.search(rf"\b{package}\b", cell, re.IGNORECASE) and not f"{cell}, ".startswith(f"{package} {version}, ")
    ]
    assert not wrong, f"{name_of(page)} has columns {'; '.join(wrong)}"


def test_the_comparison_has_a_column_for_every_other_package():
    heads = [cell for page in figures.PAGES for cell in columns(page)]
    assert {f"{package} {version}" for package, version in versions().items()} <= {*heads}
