"""Runs a program on a model and writes down what can be observed: values, gradients, hooks' calls, errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .models import B, V, patched, reads
from .names import Patch, labels_of, like, session
from .programs import Program, Setting, Statement

__all__ = ["Run", "Setting", "observe", "session"]

#: What is observed: (what it is, the value).
Observed = list[tuple[str, Any]]


_SIMPLE = (int, float, str, bool, type(None))

OPERANDS = ("bias", "temperature", "scales", "matrix", "shift")


class Run:
    """A program that is being run; `observed` grows by what each statement shows."""

    def __init__(self, setting: Setting, patch: Patch) -> None:
        self.setting, self.patch = setting, patch
        self.names = session(setting, patch)
        self.variables: list[str] = []
        self.observed: Observed = []
        self.ended = False
        self._retained: set[str] = set()
        self._freed: set[str] = set()
        self._hidden: dict[int, StorageWeakRef] = {}
        if setting.held:
            # A function, as a bound method would be copied with the model.
            self.names["model"].lm_head.register_forward_pre_hook(lambda _, args: self._remember(args[0]))
        self._background = _Background(self.names) if setting.beside else None

    def _remember(self, hidden: Tensor) -> None:
        ref = StorageWeakRef(hidden.untyped_storage())
        self._hidden.setdefault(ref.cdata, ref)

    def step(self, statement: Statement) -> None:
        if self.ended or not statement.uses <= self.names.keys():
            return
        try:
            before = self._reads() if statement.quiet else {}
            exec(statement.code, self.names)
            after = self._reads() if statement.quiet else {}
        except Exception as e:
            self.observed.append((f"error of `{statement.text}`", e.with_traceback(None)))
            self.ended = statement.backward
            return
        if statement.quiet:
            new = sorted(name for i, found in enumerate(after) for name in found if found[name] != before[i].get(name))
            self.observed.append((f"reads by `{statement.text}`", tuple(new)))
        for name in statement.makes:
            self._observe(f"{name} of `{statement.text}`", functools.partial(self._described, name))
            self.variables.append(name)
        for name in self.variables:
            with contextlib.suppress(RuntimeError):
                _ = getattr(
                    self.names[name], "grad_fn", None
                )  # else PyTorch notices a write to a view at any later time
        self._retained.update(re.findall(r"(\w+)\.retain_grad\(", statement.text))
        if ".backward(" in statement.text and "retain_graph" not in statement.text:
            self._freed.update(re.findall(r"\bs\d+\b", statement.text))
        self._flush_hooks(statement.text)

    def _reads(self) -> Any:
        return [reads(self.names[m]) for m in ("model", "other")] if self.patch is patched else []

    def _described(self, name: str) -> Any:
        """What can be asked about a value that was just made; not the strides, which have made tensors be computed."""
        return self._description(name, self.names[name])

    def _description(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            same = tuple(n for n in (*self.variables, *OPERANDS) if self.names.get(n) is value and n != name)
            return (
                f"shape {tuple(value.shape)}", str(value.dtype), f"is {same}", f"requires_grad={value.requires_grad}",
                f"is_leaf={value.is_leaf}", f"is_inference={value.is_inference()}",
            )  # fmt: skip
        if isinstance(value, (tuple, list)):
            return tuple(self._description(name, v) for v in value)
        return value if isinstance(value, _SIMPLE) else type(value).__name__

    def _flush_hooks(self, text: str) -> None:
        hooks = self.names["hooks"]
        for name in sorted(hooks.calls):
            self.observed.append((f"calls of hook {name} in `{text}`", list(hooks.calls[name])))
        hooks.calls.clear()

    def finish(self) -> Observed:
        """Reads all gradients and values, and whatever else can be seen when a program has ended."""
        if self._background is not None:
            self.observed += self._background.stop()
        if not self.ended:
            self._read_everything()
            if self.setting.held:
                self._observe_held()
        self.observed.append(("torch function modes left on", _modes_switched_off()))
        self.names.clear()
        self._hidden.clear()
        return self.observed

    def _read_everything(self) -> None:
        for module in ("model", "other"):
            for name, parameter in self.names[module].named_parameters():
                self._observe(f"gradient of {module}.{name}", functools.partial(getattr, parameter, "grad"))
        for name in (*OPERANDS, *self.variables):
            value = self.names[name]
            if isinstance(value, Tensor):
                self._observe(f"gradient of {name}", functools.partial(self._gradient, name, value))
        for name in (*OPERANDS, *self.variables):
            self._observe(f"value of {name}", functools.partial(self.names.get, name))
        for name in self.variables:
            if isinstance(self.names[name], Tensor):
                self._observe(f"strides of {name}", functools.partial(_strides, self.names[name]))
        with torch.no_grad():  # another model's loss is its own
            x = F.linear(self.names["shift"].expand(B, V), self.names["matrix"].detach())
            self._observe("loss of a model that is not patched", lambda: F.cross_entropy(x, labels_of(x)))

    def _gradient(self, name: str, value: Tensor) -> Any:
        """The gradient of a leaf, or of a tensor that was told to retain it; others are not asked."""
        return value.grad if name in self._retained or value.is_leaf else None

    def _observe(self, label: str, value: Callable[[], Any]) -> None:
        try:
            found = _copied(value())
        except Exception as e:
            found = e.with_traceback(None)
        self.observed.append((label, found))

    def _observe_held(self) -> None:
        """Counts the hidden states that losses hold which have had their backward, or have it now, or need none.

        A loss that is still to be differentiated may hold some, where plain PyTorch holds log-probabilities. This goes
        for a loss as well whose backward fails because that of another one has freed the graph that they share.
        """
        tensors = {n: self.names[n] for n in self.variables if isinstance(self.names[n], Tensor)}
        kept = [t for n, t in tensors.items() if t.dim() == 0 and (n in self._freed or _differentiated(t))]
        tensors.clear()
        kept_models = self.names["model"], self.names["other"]
        self.names.clear()
        self.names.update(kept=kept, models=kept_models)
        if not all(ref.expired() for ref in self._hidden.values()):
            gc.collect()
        held = sum(not ref.expired() for ref in self._hidden.values())
        self.observed.append(("hidden states held by losses", held))


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides of the dimensions in which there is more than one element; the others mean nothing."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def _differentiated(loss: Tensor) -> bool:
    """Runs the backward of a loss that requires a gradient; whether that went well.

    If it fails, what waited in autograd's queue of this thread would be held, so it has a thread of its own.
    """
    failed: list[bool] = []

    def backward() -> None:
        try:
            loss.backward()
        except Exception:
            failed.append(True)

    if loss.requires_grad:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    return not failed


def _modes_switched_off() -> int:
    """Switches off modes that a program has left on in this thread, and says how many there were."""
    left = torch._C._len_torch_function_stack()
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    return left


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        with torch.no_grad():
            return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return [_copied(v) for v in value]
    return value if isinstance(value, _SIMPLE) else type(value).__name__


class _Background:
    """A thread that trains and evaluates the program's model, and one that is not patched, until it is stopped."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.model, self.ids, self.labels = names["model"], names["ids"], names["labels"]
        self.results: list[list[Tensor]] = []
        self.error: Exception | None = None
        self.stopped = threading.Event()
        self.interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def _loop(self) -> None:
        until = time.monotonic() + 3
        while self.error is None and not self._had_enough(until):
            try:
                self.results.append(self._once())
            except Exception as e:
                self.error = e.with_traceback(None)

    def _had_enough(self, until: float) -> bool:
        """At least twice; eight times if there is time, and until the program ends if that is not too often."""
        count = len(self.results)
        late = time.monotonic() > until
        return count >= 2 and (late or count >= 40 or (count >= 8 and self.stopped.is_set()))

    def _once(self) -> list[Tensor]:
        model, ids, labels = self.model, self.ids, self.labels
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(ids, labels=labels).loss
        found = [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]
        with torch.no_grad():
            found.append(model(ids).logits)
        logits = model(ids).logits
        found += torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), parameters[-1:])
        twin = copy.deepcopy(model)
        found.append(twin(ids, labels=labels).loss.detach())
        plain = like(logits.detach())
        found.append(F.cross_entropy(plain.flatten(0, 1), labels.flatten()))
        return [torch.zeros(()) if t is None else t for t in found]

    def stop(self) -> Observed:
        self.stopped.set()
        self.thread.join()
        sys.setswitchinterval(self.interval)
        if self.error is not None:
            return [("error in the thread beside", self.error)]
        first = self.results[0]
        same = all(
            torch.allclose(a, b, rtol=1e-6, atol=1e-7) for r in self.results for a, b in zip(first, r, strict=True)
        )
        return [("results of the thread beside", first), ("results of the thread beside stay", same)]


def observe(program: Program, patch: Patch) -> Observed:
    """What the program shows on a model that `patch` has changed; None for the plain model."""
    run = Run(program.setting, patch)
    for statement in program.statements:
        run.step(statement)
    return run.finish()
