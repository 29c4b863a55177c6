"""Reads the blocks of code and the links of Markdown files, for the tests of the documentation."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from .paths import ROOT

DOCS = ROOT / "docs"
#: Every page that a reader may open.
PAGES = sorted(
    [*ROOT.glob("*.md"), *(path for name in ("docs", "examples", ".github") for path in (ROOT / name).rglob("*.md"))]
)

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block."""

    page: str
    line: int  # of its first line of code, from 1
    language: str
    code: str
    output: str | None  # what it prints, if a block of "text" follows it directly

    def run(self, scope: dict[str, Any]) -> None:
        """Executes a Python block; errors name the page and the line in it."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), scope)
        if self.output is not None:
            assert printed.getvalue() == self.output, f"{self.page}:{self.line} prints\n{printed.getvalue()}"

    @property
    def checks(self) -> bool:
        """Whether running the block also checks a result."""
        return self.output is not None or "assert" in self.code


def blocks(page: Path, language: str = "python") -> list[Block]:
    """The fenced blocks of a language, including indented ones, in the order of the page."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    made = []
    for fence, following in itertools.zip_longest(found, found[1:]):
        if fence["language"] != language:
            continue
        output = None
        if (
            following is not None
            and following["language"] == "text"
            and not text[fence.end() : following.start()].strip()
        ):
            output = textwrap.dedent(following["code"])
        line = text.count("\n", 0, fence.start("code")) + 1
        made.append(Block(name_of(page), line, language, textwrap.dedent(fence["code"]), output))
    return made


def links(page: Path) -> list[str]:
    """The targets of links and pictures that are files of the repository or places in them, with their anchors."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = (match["target"] for match in _LINK.finditer(text))
    return [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """What may follow the # of a link: headings, as GitHub and MkDocs name them, and names that the reference shows."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\](\([^)]*\))?", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\s-]", "", shown).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found | {*re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


def names_of(page: str) -> dict[str, Any]:
    """What the Python blocks of a page define: they are run in one scope, from top to bottom."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(DOCS / page):
        block.run(scope)
    return scope
