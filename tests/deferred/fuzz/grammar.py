"""How a program is drawn: statements of `templates.py` that fit what the plain model has shown by then."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .interpreter import Observed, Run
from .models import D, V
from .programs import Program, Setting, Statement
from .templates import TEMPLATES, WITH_OPTIONS, Template

#: Draws one of several; hypothesis' or random's.
Pick = Callable[[Sequence[Any]], Any]

_CLASSES = (V, 9, 7, 6)

_PLACEHOLDER = re.compile(r"\{(\w+)(!?)\}")

_PREFIX = {"new": "x", "new_loss": "s", "new_second": "c", "new_hidden": "h", "new_value": "v"}

_MODES = (
    *[""] * 14, "with torch.no_grad(): ", "with torch.no_grad(): ", "with torch.inference_mode(): ",
    "with torch.no_grad(), torch.enable_grad(): ", "with torch.enable_grad(): ",
)  # fmt: skip


def _is_logits(t: Tensor) -> bool:
    return t.is_floating_point() and t.dim() >= 2 and t.shape[-1] in _CLASSES and t.numel() > 0


def _is_sharp(t: Tensor) -> bool:
    """Whether no two logits of a row are as good as equal, and none is as good as 0 or 1 or -1."""
    if not _is_logits(t):
        return False
    if t.is_meta:
        return True
    with torch.no_grad():
        x = t.detach().double()
        marks = torch.tensor([-1.5, -1.0, 0.0, 1.0], dtype=torch.float64).expand(*x.shape[:-1], 4)
        gap = torch.cat([x, marks], -1).sort(-1).values.diff(dim=-1).min()
        return bool(x.isfinite().all() and gap > (1e-7 if t.dtype == torch.float64 else 1e-4) * x.abs().max())


_FITS: dict[str, Callable[[Tensor], bool]] = {
    "x": _is_logits,
    "full": lambda t: _is_logits(t) and t.shape[-1] == V,
    "tokens": lambda t: _is_logits(t) and t.dim() == 3 and t.shape[1] > 1,
    "rows": lambda t: _is_logits(t) and t.dim() == 2,
    "small": lambda t: _is_logits(t) and (t.is_meta or bool(t.detach().abs().max() < 20)),
    "sharp": _is_sharp,
    "second": lambda t: t.is_floating_point() and t.dim() == 3 and t.shape[1] in _CLASSES and t.shape[2] < 6,
    "hidden": lambda t: t.is_floating_point() and t.dim() == 3 and t.shape[-1] == D,
    "scalar": lambda t: t.is_floating_point() and t.dim() == 0,
    "solid": lambda t: t.is_floating_point() and t.dim() == 0 and (t.is_meta or bool(t.detach().abs() > 1e-3)),
    "loss": lambda t: t.is_floating_point() and t.dim() == 0 and t.requires_grad,
    "grad": lambda t: t.is_floating_point() and t.requires_grad,
    "node": lambda t: t.is_floating_point() and t.requires_grad and not t.is_leaf,
    "any": lambda t: t.is_floating_point(),
}
_FITS |= {"like": _is_logits, "loss2": _FITS["loss"], "grad2": _FITS["grad"]}


def _holds(fit: Callable[[Tensor], bool], t: Tensor) -> bool:
    try:
        return fit(t)
    except RuntimeError:  # a view of several that PyTorch has invalidated answers no question
        return False


class _Drawing:
    """Statements that fit what the plain run has by now."""

    def __init__(self, pick: Pick, run: Run, without: Iterable[str]) -> None:
        self.pick, self.run, self.count = pick, run, 0
        setting = run.setting
        table = WITH_OPTIONS if setting.options else TEMPLATES
        banned = {"not_beside"} if setting.beside else set()
        banned |= {"not_held"} if setting.held else set()
        banned |= {"fusible"} if setting.model in ("where", "frozen function", "frozen no_grad") else set()
        self.templates = [t for t in table if t.kind not in set(without) and not t.flags & banned]
        self.weighted = [t for t in self.templates for _ in range(1 if "rare" in t.flags else t.weight)]

    def statement(self, kinds: Sequence[str] = ()) -> Statement | None:
        """A statement of one of the kinds, or of any; None if the program has nothing that fits the template drawn."""
        choices = [t for t in self.weighted if t.kind in kinds] if kinds else self.weighted
        template = self.pick(choices)
        if "slow" in template.flags and self.pick(range(8)):
            return None
        return self._filled(template)

    def _filled(self, template: Template) -> Statement | None:
        """The template with variables for its placeholders; what makes such a variable where there is none."""
        chosen: dict[str, str] = {}
        makes: list[str] = []

        def name(match: re.Match[str]) -> str:
            what = match[1]
            if what == "hook":
                return f"hook{self._next()}"
            if what in _PREFIX:
                if not match[2]:
                    makes.append(f"{_PREFIX[what]}{self._next()}")
                return makes[-1]
            if what not in chosen:
                chosen[what] = self._variable(what, chosen)
            return chosen[what]

        try:
            text = _PLACEHOLDER.sub(name, template.text)
        except LookupError as e:
            makers = [t for t in self.templates if t.text.startswith(f"{{new_{e.args[0]}}}")]
            return None if template in makers or not makers else self._filled(self.pick(makers))
        if "moded" in template.flags and not self.run.setting.options:
            text = self.pick(_MODES) + text
        return Statement(template.kind, text, tuple(makes), "backward" in template.flags, "quiet" in template.flags)

    def _next(self) -> int:
        self.count += 1
        return self.count - 1

    def _variable(self, what: str, chosen: dict[str, str]) -> str:
        names, fit = self.run.names, _FITS[what]
        given = names[next(iter(chosen.values()))] if what == "like" and chosen else None
        fits = [n for n in self.run.variables if isinstance(names[n], Tensor) and _holds(fit, names[n])]
        if given is not None:
            fits = [n for n in fits if names[n].shape == given.shape]
        if what in ("grad", "grad2"):
            fits = ["bias", "temperature", *fits]
        if not fits:
            raise LookupError(what)
        return self.pick([*fits, *fits[-2:], fits[-1]])


def _setting(pick: Pick) -> Setting:
    models = ["tiny"] * 8 + ["bias"] * 2 + ["llama"] * 2 + ["gpt"] * 4
    models += ["tied", "capped", "where", "frozen function", "frozen no_grad"]
    special = pick([""] * 38 + ["beside"] * 2 + ["held"] * 5 + ["options"] * 3 + ["meta"] * 2)
    model = pick(models)
    if special == "beside":
        model = pick(["llama", "llama", "llama", "tiny", "bias"])
    if special == "options" and model not in ("tiny", "bias", "capped", "where"):
        model = "tiny"
    dtype = pick(["float64"] * 4 + ["float32"])
    return Setting(
        model,
        dtype,
        "meta" if special == "meta" else "cpu",
        special == "beside",
        special == "held",
        special == "options",
    )


def draw(pick: Pick, without: Iterable[str] = ()) -> tuple[Program, Observed]:
    """A program of statements that fit, and what it shows on the plain model."""
    run = Run(_setting(pick), None)
    drawing = _Drawing(pick, run, without)
    statements: list[Statement] = []

    def add(kinds: Sequence[str] = ()) -> None:
        statement = drawing.statement(kinds)
        if statement is not None and not run.ended:
            statements.append(statement)
            run.step(statement)

    add(["forward"])
    for _ in range(pick(range(3, 15))):
        add()
    if not any("backward" in s.text for s in statements) or pick(range(3)):
        if not any(isinstance(run.names[n], Tensor) and _holds(_FITS["loss"], run.names[n]) for n in run.variables):
            add(["cross entropy"])
        add(["backward"])
    return Program(run.setting, tuple(statements)), run.finish()
