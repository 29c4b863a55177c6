"""Reads the blocks of code and the links of Markdown files, for the tests of the documentation."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
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
    r"^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<title>[^\"\n]+)\")?[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
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


class Program(NamedTuple):
    """A file that a page shows whole, with the command that starts it and the end of what that prints."""

    page: str
    file: str
    code: str
    command: str
    output: str

    def run(self, folder: Path) -> str:
        """What the command prints, as a reader starts it: the file is in the folder, and one CPU core for each rank."""
        (folder / self.file).write_text(self.code)
        launcher, *words = shlex.split(self.command)
        assert launcher == "torchrun"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def programs(page: Path) -> list[Program]:
    """The Python blocks of a page that have a title, each followed by a block with a command and one of output."""
    found = list(_FENCE.finditer(page.read_text(encoding="utf-8")))
    made = []
    for place, fence in enumerate(found):
        if fence["title"] is not None and fence["language"] == "python":
            command, output = found[place + 1 : place + 3]
            assert (command["language"], output["language"]) == ("bash", "text"), f"{name_of(page)}: {fence['title']}"
            made.append(Program(name_of(page), fence["title"], fence["code"], command["code"], output["code"]))
    return made


def blocks(page: Path, language: str = "python") -> list[Block]:
    """The fenced blocks of a language, including indented ones, in the order of the page, but for whole programs."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    made = []
    for fence, following in itertools.zip_longest(found, found[1:]):
        if fence["language"] != language or fence["title"] is not None:
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
