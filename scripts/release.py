"""Makes a release: `make release` says what is inconsistent or, if nothing is, builds dist/ and checks it.

The version is that of `fused_ignore_ce/__init__.py`. CHANGELOG.md, CITATION.cff and the tag have to name the same one,
and nothing may be left to commit. `make release TAG=v0.2.0` is what CI runs for a tag; without a tag, the command to
make one is printed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .project import ROOT, version


class Section(NamedTuple):
    """A release in CHANGELOG.md."""

    name: str
    date: str | None
    body: str


def sections(changelog: str) -> list[Section]:
    """The releases, the newest first, from headings such as `## [0.2.0] - 2026-11-24`."""
    _, *parts = re.split(r"^## ", changelog, flags=re.MULTILINE)
    found = []
    for part in parts:
        heading, _, body = part.partition("\n")
        match = re.fullmatch(r"\[?([^\]\s]+)\]?(?: - (\d{4}-\d{2}-\d{2}))?", heading.strip())
        if not match:
            raise ValueError(f"CHANGELOG.md: expected a heading such as ## [0.2.0] - 2026-11-24, got ## {heading}")
        found.append(Section(match[1], match[2], body.strip()))
    return found


def problems(root: Path = ROOT, tag: str | None = None) -> list[str]:
    """The reasons why the commit that is checked out cannot be released."""
    own = version(root)
    expected = f"v{own}"
    found = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", own):
        found.append(f"fused_ignore_ce/__init__.py: expected a version such as 0.2.0 or 0.2.0rc1, got {own}")
    if changes := _git(root, "status", "--porcelain"):
        found.append(f"git: expected a clean tree, got changes in {', '.join(line[3:] for line in changes)}")
    found += _changelog_problems(root, own)
    found += _citation_problems(root, own)
    if tag is not None and tag != expected:
        found.append(f"tag: expected {expected}, as the version is {own}, got {tag}")
    tagged = _git(root, "rev-list", "-n", "1", expected) if expected in _git(root, "tag", "--list") else []
    if tagged and tagged != _git(root, "rev-parse", "HEAD"):
        found.append(f"tag: expected {expected} on the commit that is checked out, got it on {tagged[0]}")
    if tag == expected and not tagged:
        found.append(f"tag: expected {tag} in this repository, got no such tag; fetch the tags")
    return found


def _changelog_problems(root: Path, own: str) -> list[str]:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, *released = sections(text)
    if unreleased.name != "Unreleased":
        return [f"CHANGELOG.md: expected ## [Unreleased] first, got ## [{unreleased.name}]"]
    found = []
    if unreleased.body:
        found.append("CHANGELOG.md: expected nothing under [Unreleased]; move it into the section of the release")
    if not released or released[0].name != own or released[0].date is None or not released[0].body:
        newest = f"[{released[0].name}] - {released[0].date}" if released else "no release"
        found.append(f"CHANGELOG.md: expected a section ## [{own}] with a date and a text first, got {newest}")
    return found


def _citation_problems(root: Path, own: str) -> list[str]:
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    dates = {s.name: s.date for s in sections((root / "CHANGELOG.md").read_text(encoding="utf-8"))}
    found = []
    for key, expected in (("version", own), ("date-released", dates.get(own))):
        values = re.findall(rf"^{key}: \"?([^\"\n]*)\"?$", text, flags=re.MULTILINE)
        if values != [expected]:
            found.append(f"CITATION.cff: expected {key}: {expected}, got {values}")
    return found


def build(root: Path, out: Path) -> list[Path]:
    """Builds the sdist and, from it, the wheel, with the tools of this environment. Checks both, and returns them."""
    tools = [sys.executable, "-m"]
    subprocess.run([*tools, "build", "--no-isolation", "--outdir", str(out), str(root)], check=True)
    files = sorted(out.iterdir())
    if [path.name.rpartition("-")[2] for path in files] != ["any.whl", f"{version(root)}.tar.gz"]:
        raise RuntimeError(f"{out}: expected a wheel and an sdist, got {[path.name for path in files]}")
    subprocess.run([*tools, "twine", "check", "--strict", *map(str, files)], check=True)
    subprocess.run([*tools, "check_wheel_contents", str(files[0])], check=True)
    return files


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.release", description="Checks and builds a release.")
    parser.add_argument("--tag", help="the tag that is released, such as v0.2.0")
    tag = parser.parse_args().tag or None
    found = problems(ROOT, tag)
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        return 1
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for path in build(ROOT, ROOT / "dist"):
        print(path.relative_to(ROOT))
    if tag is None:
        name = f"v{version()}"
        print(f"To publish it: git tag -a {name} -m 'fused_ignore_ce {name}' && git push origin {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
