"""Draws programs, judges them, and makes those that fail small."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .comparison import NOT_RAISED, RAISED, RIGHT, WRONG, Verdict, judge
from .grammar import draw
from .interpreter import Observed, observe
from .models import patched
from .names import Patch
from .programs import Program, Setting

__all__ = ["NOT_RAISED", "RAISED", "RIGHT", "WRONG", "Failure", "drawn", "smallest", "verdict_of"]


class Failure(NamedTuple):
    program: Program
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.verdict.verdict}: {self.verdict.what}\n\n{self.program}"


def drawn(seed: int, without: Iterable[str] = ()) -> tuple[Program, Observed]:
    """The program of a seed, and what it shows on the plain model."""
    return draw(random.Random(seed).choice, without)


def verdict_of(program: Program, patch: Patch = patched, plain: Observed | None = None) -> Verdict:
    """How a program on the patched model compares with the same on the plain one."""
    setting = program.setting
    expected = observe(program, None) if plain is None else plain
    return judge(observe(program, patch), expected, setting.dtype, program.refusals, program.leniencies)


def smallest(failure: Failure, patch: Patch = patched, tries: int = 300, seconds: float = 20) -> Failure:
    """The smallest program found that fails in the same way, with a simpler setting, fewer statements and variables."""
    tried: set[Program] = set()
    until = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for candidate in _simpler(failure.program):
            if candidate in tried:
                continue
            if len(tried) == tries or time.monotonic() > until:
                return failure
            tried.add(candidate)
            verdict = verdict_of(candidate, patch)
            if verdict.verdict == failure.verdict.verdict and _symptom(verdict) == _symptom(failure.verdict):
                failure, found = Failure(candidate, verdict), True
                break
    return failure


def _symptom(verdict: Verdict) -> str:
    """What was seen, without names of variables and texts of statements."""
    what = re.sub(r"`[^`]*`", "", verdict.what)
    return re.sub(r"\b[a-z]\d+\b", "", what).partition(":")[0] if verdict.verdict != RAISED else what[-60:]


def _simpler(program: Program) -> Iterator[Program]:
    setting, statements = program
    n = len(statements)
    for size in (n // 2, n // 4, 1):
        if size:
            for start in range(n - size, -1, -1):
                if size == 1 or start % size == 0:
                    yield Program(setting, statements[:start] + statements[start + size :])
    for simple in _simpler_settings(setting):
        yield Program(simple, statements)
    for i, statement in enumerate(statements):
        bare = re.sub(r"^with torch\.\w+\(\)(, torch\.\w+\(\))*: ", "", statement.text)
        if bare != statement.text:
            yield Program(setting, (*statements[:i], statement._replace(text=bare), *statements[i + 1 :]))
        made = [name for name in statement.makes if name[0] == "x"]
        for old in sorted(n for n in statement.uses if n[0] == "x"):
            if made:  # whoever uses what it makes uses what it is made of instead
                later = [s._replace(text=re.sub(rf"\b{made[0]}\b", old, s.text)) for s in statements[i + 1 :]]
                yield Program(setting, (*statements[:i], *later))


def _simpler_settings(setting: Setting) -> Iterator[Setting]:
    plain = Setting()
    for name, value in setting._asdict().items():
        simple = getattr(plain, name)
        if value != simple:
            yield setting._replace(**{name: simple})
