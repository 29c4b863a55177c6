"""Programs as data: the model they run on, and statements that are lines of Python."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What a program runs on.

    `beside`: another thread trains and evaluates the same model meanwhile. `held`: it is checked which hidden states
    the program's losses keep alive. `options`: the model is patched with label smoothing.
    """

    model: str = "tiny"
    dtype: str = "float64"
    device: str = "cpu"
    beside: bool = False
    held: bool = False
    options: bool = False

    def __str__(self) -> str:
        given = [f"{k}={v!r}" for k, v in self._asdict().items() if v != Setting._field_defaults[k]]
        return f"Setting({', '.join(given)})"


class Statement(NamedTuple):
    """`text` is run; `makes` are the variables that it assigns.

    `backward`: it runs a backward pass, after whose failure gradients are undefined. `quiet`: it computes no logits.
    """

    kind: str
    text: str
    makes: tuple[str, ...] = ()
    backward: bool = False
    quiet: bool = False

    @property
    def code(self) -> Any:
        return _compiled(self.text)

    @property
    def uses(self) -> frozenset[str]:
        """The variables that it needs."""
        return frozenset(filter(_VARIABLE.fullmatch, _names(self.code))) - frozenset(self.makes)


@functools.lru_cache(maxsize=4096)
def _compiled(text: str) -> Any:
    return compile(text, "<program>", "exec")


def _names(code: Any) -> frozenset[str]:
    inner = (c for c in code.co_consts if hasattr(c, "co_names"))
    return frozenset(code.co_names).union(*map(_names, inner))


_VARIABLE = re.compile(r"[a-z]\d+")

_NAMES_INPUTS = re.compile(r"inputs=|autograd\.grad\(")

_WRITES_TO_HEAD = re.compile(r"\.step\(|model\.lm_head\.weight\.\w+_\(|\bh\d+\.\w+_\(")


class Program(NamedTuple):
    setting: Setting
    statements: tuple[Statement, ...]

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its statements and the peculiarities of its setting."""
        s = self.setting
        flags = {"beside": s.beside, "held": s.held, "options": s.options, s.device: s.device != "cpu"}
        head = {s.model} if s.model.startswith("frozen") or s.model == "where" else set()
        return frozenset(st.kind for st in self.statements) | {k for k, on in flags.items() if on} | head

    @property
    def refusals(self) -> tuple[str, ...]:
        """Parts of the messages of errors that deferred logits may raise in this program by design."""
        texts = [st.text for st in self.statements]
        may_free_more = self.setting.model == "frozen no_grad" or any(map(_NAMES_INPUTS.search, texts))
        saves_logits = self.setting.model == "where" or self.setting.device == "meta"
        writes_to_head = any(map(_WRITES_TO_HEAD.search, texts))
        return (
            *("label_smoothing",) * self.setting.options,  # an option may be refused, and never lost
            *("the head's weights or the hidden states were changed in place",) * writes_to_head,
            *("Trying to backward through the graph a second time",) * may_free_more,
            *("modified by an inplace operation",) * (writes_to_head or saves_logits),
        )

    @property
    def leniencies(self) -> tuple[str, ...]:
        """Parts of the messages of errors of plain PyTorch that deferred logits need not raise in this program."""
        parts = any(re.search("split|unbind|chunk", st.text) for st in self.statements)
        names_inputs = any(_NAMES_INPUTS.search(st.text) for st in self.statements)
        detaches = any("detach_(" in st.text for st in self.statements)
        return (
            "Inference tensors cannot be saved for backward",
            "a saved tensor that has been detached in-place",
            *("Trying to backward through the graph a second time",) * (parts or names_inputs),
            *("function that returns multiple views",) * parts,
            *("a view of a leaf Variable that requires grad",) * detaches,
        )

    def __str__(self) -> str:
        """A snippet that runs the program on the patched model; `patch=None` in it runs the plain one."""
        lines = [
            "from tests.deferred.fuzz.names import Setting, session",
            f"globals().update(session({self.setting}))",
            *(st.text for st in self.statements),
        ]
        return "\n".join(lines)
