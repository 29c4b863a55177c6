"""A release is refused while the version, CHANGELOG.md, CITATION.cff, the tag and the tree do not agree."""

import datetime
import shutil
import subprocess

import pytest

import fused_ignore_ce
from scripts import project, release

CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2026-11-24

### Added

- A thing.

## 1.2.2 - 2026-11-23

- Another.
"""


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path):
    """A repository that is ready for release 1.2.3."""
    (tmp_path / "fused_ignore_ce").mkdir()
    (tmp_path / "fused_ignore_ce" / "__init__.py").write_text('"""A package."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "CITATION.cff").write_text('version: 1.2.3\ndate-released: "2026-11-24"\n')
    shutil.copy(project.ROOT / "pyproject.toml", tmp_path)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "change")


def edit(root, name, before, after):
    path = root / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_all_agree(root):
    assert release.problems(root) == []
    git(root, "tag", "-a", "v1.2.3", "-m", "release")
    assert release.problems(root) == []
    assert release.problems(root, "v1.2.3") == []


@pytest.mark.parametrize(
    ("name", "before", "after", "problem"),
    [
        (
            "fused_ignore_ce/__init__.py",
            "1.2.3",
            "1.2.4",
            "section ## [1.2.4] with a date and a text first, got [1.2.3]",
        ),
        ("fused_ignore_ce/__init__.py", "1.2.3", "1.2", "expected a version such as 0.2.0 or 0.2.0rc1, got 1.2"),
        ("CHANGELOG.md", "## [1.2.3] - 2026-11-24", "## [1.2.3]", "section ## [1.2.3] with a date"),
        ("CHANGELOG.md", "### Added\n\n- A thing.\n", "", "section ## [1.2.3] with a date and a text"),
        ("CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n\n- More.\n", "nothing under [Unreleased]"),
        ("CHANGELOG.md", "## [Unreleased]\n", "", "expected ## [Unreleased] first"),
        ("CITATION.cff", "1.2.3", "1.2.2", "expected version: 1.2.3, got ['1.2.2']"),
        ("CITATION.cff", "2026-11-24", "2026-11-23", "expected date-released: 2026-11-24, got ['2026-11-23']"),
    ],
)
def test_a_disagreement_is_named(root, name, before, after, problem):
    edit(root, name, before, after)
    commit(root)
    found = release.problems(root)
    assert any(problem in line for line in found), found
    assert any(line.startswith(name) or line.startswith("CHANGELOG.md") for line in found)


def test_changes_are_named(root):
    (root / "new.py").touch()
    assert release.problems(root) == ["git: expected a clean tree, got changes in new.py"]


def test_the_tag_is_the_versions_and_on_this_commit(root):
    assert release.problems(root, "v1.2.2") == ["tag: expected v1.2.3, as the version is 1.2.3, got v1.2.2"]
    assert "fetch the tags" in release.problems(root, "v1.2.3")[0]
    git(root, "tag", "v1.2.3")
    commit(root)
    for tag in (None, "v1.2.3"):
        assert "tag: expected v1.2.3 on the commit that is checked out" in release.problems(root, tag)[0]


def test_a_heading_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="expected a heading such as"):
        release.sections("# Changelog\n\n## Version 1.0 of today\n")


def test_nothing_is_built_while_there_are_problems(monkeypatch, capsys):
    monkeypatch.setattr(release, "problems", lambda root, tag: [f"no {tag}"])
    monkeypatch.setattr(release, "build", lambda *_: pytest.fail("built"))
    monkeypatch.setattr("sys.argv", ["release", "--tag", "v9.9.9"])
    assert release.main() == 1
    assert capsys.readouterr().err == "no v9.9.9\n"


def test_this_repositorys_own_files():
    """Between releases, the changelog's newest release is the version that was released last."""
    sections = release.sections((project.ROOT / "CHANGELOG.md").read_text())
    assert sections[0].name == "Unreleased"
    assert project.version() == fused_ignore_ce.__version__
    for section in sections[1:]:
        datetime.date.fromisoformat(section.date)
        assert section.body
    assert release._citation_problems(project.ROOT, sections[1].name) == []
