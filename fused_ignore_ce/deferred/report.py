"""The report on a patched model's logits: which losses were fused, and which operations read the logits."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.eager import PACKAGE

#: The end of the name of a loss that was taken while torch.compile traced. Its ignored tokens are not counted.
COMPILED = "(compiled)"

#: Packages whose frames are never the caller that a report names.
_INTERNAL = ("torch", PACKAGE, "contextlib", "functools")


@dataclass
class FusedCalls:
    """The calls of one kind of loss that were computed without logits."""

    calls: int = 0
    #: Positions of all calls together, ignored ones included.
    tokens: int = 0
    #: How many of those positions were ignored.
    ignored: int = 0


@dataclass
class FusionReport:
    """What a patched model's logits were used for since it was patched; `print` shows it as a table.

    Attributes:
        fused: by kind of loss, such as "cross_entropy" or "gather(log_softmax(logits))": the calls that needed no
            logits, the tokens of those calls, and how many of the tokens were ignored.
        on_logits: by kind of loss: the calls of a loss of this package on logits that were computed, because the head
            could not be deferred.
        reads: by "operation (file:line)": how often it made deferred logits be computed.
        not_fused: by reason: how often nothing was fused in a forward, or a head could not be deferred.
        bytes_not_allocated: bytes of the logits, in their dtype, that losses were taken of and that nobody read. Each
            is counted once.
    """

    fused: dict[str, FusedCalls] = field(default_factory=dict)
    on_logits: dict[str, FusedCalls] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    not_fused: dict[str, int] = field(default_factory=dict)
    bytes_not_allocated: int = 0

    def add(self, other: FusionReport) -> None:
        """Adds what another model's report counted."""
        for mine, theirs in ((self.fused, other.fused), (self.on_logits, other.on_logits)):
            for kind, count in theirs.items():
                total = mine.setdefault(kind, FusedCalls())
                total.calls += count.calls
                total.tokens += count.tokens
                total.ignored += count.ignored
        for counts, more in ((self.reads, other.reads), (self.not_fused, other.not_fused)):
            for name, times in more.items():
                counts[name] = counts.get(name, 0) + times
        self.bytes_not_allocated += other.bytes_not_allocated

    def __str__(self) -> str:
        lines = []
        for title, kinds in (("fused", self.fused), ("on logits", self.on_logits)):
            for kind, count in kinds.items():
                ignored = "ignored ones" if kind.endswith(COMPILED) else f"{count.ignored} of them ignored"
                ignored += " not counted" * kind.endswith(COMPILED)
                calls, tokens = counted(count.calls, "call"), counted(count.tokens, "token")
                lines.append(f"{title}: {kind}: {calls}, {tokens}, {ignored}")
        lines += [f"not fused, {counted(times, 'time')}: {reason}" for reason, times in self.not_fused.items()]
        lines += [f"logits read by {reader}: {counted(times, 'time')}" for reader, times in self.reads.items()]
        if not lines:
            return "no loss was taken of this model's logits, and nothing read them (is it patched?)"
        if self.fused and not self.reads:
            lines.append("logits read: never")
        return "\n".join([*lines, f"logits not allocated: {self.bytes_not_allocated / 2**20:.1f} MiB"])


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


#: Held while a recorder counts, or is read. A reentrant one, as adding tensors may run code of a user's modes.
_counting = threading.RLock()


class Recorder:
    """Counts while a model runs; counts of ignored tokens stay on their device until the report is asked for."""

    def __init__(self) -> None:
        self._fused: dict[str, list[Any]] = {}
        self._on_logits: dict[str, list[Any]] = {}
        self._reads: dict[str, int] = {}
        self._not_fused: dict[str, int] = {}
        self.bytes = 0

    def add(self, kind: str, tokens: int, ignored: Tensor | None, fused: bool = True) -> None:
        """Counts one call. `ignored` is a 0-d tensor; on the meta device, or if it is None, none are counted."""
        with _counting:
            counts = (self._fused if fused else self._on_logits).setdefault(kind, [0, 0, {}])
            counts[0] += 1
            counts[1] += tokens
            if ignored is not None and not ignored.is_meta:
                before = counts[2].get(ignored.device)
                counts[2][ignored.device] = ignored if before is None else before + ignored

    def add_read(self, operation: str) -> str:
        """Counts a reader, and returns its name."""
        reader = f"{operation} ({caller()})"
        with _counting:
            self._reads[reader] = self._reads.get(reader, 0) + 1
        return reader

    def add_not_fused(self, reason: str) -> None:
        with _counting:
            self._not_fused[reason] = self._not_fused.get(reason, 0) + 1

    def add_bytes(self, size: int) -> None:
        with _counting:
            self.bytes += size

    def report(self) -> FusionReport:
        def calls_of(kinds: dict[str, list[Any]]) -> dict[str, FusedCalls]:
            return {
                kind: FusedCalls(calls, tokens, sum(int(t) for t in ignored.values()))
                for kind, (calls, tokens, ignored) in kinds.items()
            }

        with _counting:
            return FusionReport(
                calls_of(self._fused), calls_of(self._on_logits), dict(self._reads), dict(self._not_fused), self.bytes
            )


def caller() -> str:
    """File and line of the code outside of PyTorch and this package that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        frame = frame.f_back
    return "backward" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
