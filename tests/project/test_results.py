"""Results that pages show say on what they were measured: a commit of this history, without changes, and versions."""

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
    """Result files, with the names of those that were asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def newest(self, command, section):
        name, result = super().newest(command, section)
        self.names.add(name)
        return name, result

    def newest_proofs(self):
        name, result = super().newest_proofs()
        self.names.add(name)
        return name, result


def of_pictures(text):
    """The result files that the pictures of a page are of, found by the line that is drawn into them."""
    results = reading.Results()
    files = [(name, result["header"]) for every in results.files.values() for name, result in every.items()]
    for picture, (_, about) in figures.shown(results).items():
        if f"pictures/{picture}.png" in text:
            drawn = [name for name, it in files if about in (reading.heading(it), f"commit {it['commit'][:7]}")]
            assert drawn, f"{picture}.png is of no result file: {about}"
            yield from drawn


def shown_by(page):
    """The result files whose figures a page shows, linked or not."""
    text = page.read_text()
    names = set(re.findall(r"bench/results/([\w-]+)\.json", text))
    if page in figures.PAGES:
        asked = Recorded()
        figures.rewritten(page, text, asked)
        names |= asked.names | {*of_pictures(text)}
    return names


@pytest.fixture(scope="module")
def shown():
    """The result files that pages show, by name."""
    names = set().union(*(shown_by(page) for page in PAGES))
    assert len(names) > 5
    files = {name: file for results in reading.Results().files.values() for name, file in results.items()}
    assert names <= files.keys(), f"pages name result files that are not there: {names - files.keys()}"
    return {name: files[name] for name in names}


def headers(result):
    """A result's header, and that of the proofs in it."""
    return [part["header"] for part in (result, result.get("proofs") or {}) if "header" in part]


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


def test_results_are_of_commits_of_this_history_and_of_clean_trees(shown):
    for name, result in shown.items():
        assert all(header["dirty"] is False for header in headers(result)), f"{name} was measured with changes"
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the project has no .git, so there is no history to look commits up in")
    if git("rev-parse", "--is-shallow-repository") == ["true"]:
        pytest.skip("this clone is shallow, so there is not enough history to look commits up in")
    history = {*git("rev-list", "HEAD")}
    for name, result in shown.items():
        unknown = {header["commit"] for header in headers(result)} - history
        assert not unknown, f"{name} was measured on {unknown}, which is no commit of this history"


def test_results_name_the_versions_of_packages(shown):
    for name, result in shown.items():
        for header in headers(result):
            needed = {"torch", "triton", "transformers"}
            for row in [*result.get("rows", []), *result.get("predictions, not measurements", [])]:
                ran = " ".join(str(row.get(key, "")) for key in ("provider", "loss", "kernel"))
                needed |= {RUN[word] for word in re.findall(r"\w+", ran) if word in RUN}
            missing = {each for each in needed if not re.match(r"\d+\.\d", header["versions"].get(each, ""))}
            assert not missing, f"{name} names no version of {missing}"


def test_the_front_page_shows_nothing_old(shown):
    """If this fails, renew the results that it names, and run `make readme-figures`."""
    dates = {name: shown[name]["header"]["date"] for name in shown_by(README)}
    dates[figures.COVERAGE.name] = re.search(r", CPU, (\S+)\.$", figures.COVERAGE.read_text(), re.MULTILINE)[1]
    old = {name: date for name, date in dates.items() if date < FRONT_PAGE_SINCE}
    assert not old, f"the front page shows figures from before {FRONT_PAGE_SINCE}: {old}"


def columns(page):
    """The cells in the heads of a page's tables."""
    for head, rule in itertools.pairwise(page.read_text().splitlines()):
        if re.fullmatch(r"\|[\s:|-]+\|", rule) and head.startswith("|"):
            yield from (cell.strip() for cell in head.strip("|").split("|"))


def versions():
    """Other packages, and their versions in the newest comparison: of PyTorch several, with slashes between them."""
    _, result = reading.Results().newest("comparison", "cells")
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
