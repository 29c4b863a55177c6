"""Compares one class of transformers with its patched self, and tells which way the patched loss was computed."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_ignore_ce.deferred import affine as deferred_affine
from fused_ignore_ce.deferred import loss as deferred_loss
from fused_ignore_ce.deferred import product as deferred_product
from fused_ignore_ce.deferred.heads import classes_of
from fused_ignore_ce.hf import patch_model
from fused_ignore_ce.hf.forward import output_embeddings

from . import overrides
from .batch import batches
from .tiny import LADDER, NUM_LABELS, tiny

#: The rule of equality: LOSS is relative; a gradient may differ by GRAD of its own largest element, and by FLOOR of the
#: largest of all gradients plus ROUNDING (some are zero but for rounding: a key's bias, say).
LOSS, GRAD, FLOOR, ROUNDING = 1e-5, 1e-4, 1e-6, 1e-7
RULE = (
    f"float32, the same weights, inputs and seed. The losses differ by at most {LOSS:g} of the loss. Every element of "
    f"every parameter's gradient, and of the returned logits, differs by at most {GRAD:g} of that tensor's largest "
    f"element, plus {FLOOR:g} of the largest element of all gradients (of the logits), plus {ROUNDING:g}, to which the "
    "loss's gradient, of order one, is rounded. A gradient that is `None` in one is `None` in the other."
)

#: The option that models are patched with, and what is said of one whose loss has it.
SMOOTHING, APPLIED = 0.1, "the loss with it"

LINEAR, LOGITS, UNTOUCHED, FAILED = "fused-linear", "fused-logits", "untouched", "not built"


class Outcome(NamedTuple):
    """How a class fared. `how` is LINEAR, LOGITS, UNTOUCHED or FAILED. `difference` is empty if there is none.

    `outside` says how a loss fared that was taken after a forward without labels; empty if none was. `option` says what
    a model that was patched with label_smoothing did: APPLIED, or its error.
    """

    mapping: str
    name: str
    how: str
    why: str
    difference: str = ""
    seconds: float = 0.0
    outside: str = ""
    option: str = ""


def compare(mapping: str, name: str) -> Outcome:
    started = time.perf_counter()
    outcome = _compare(mapping, name)
    return outcome._replace(seconds=time.perf_counter() - started)


def _compare(mapping: str, name: str) -> Outcome:
    warnings.simplefilter("ignore")  # of tiny configurations, and of what was not fused, which is in the row
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if name in overrides.REASONS:
        return Outcome(mapping, name, FAILED, overrides.REASONS[name])
    try:
        cls = getattr(transformers, name)
        if not {"labels", "start_positions"} & {*inspect.signature(cls.forward).parameters}:
            return Outcome(mapping, name, FAILED, "its forward takes no labels")
        model, batch, plain = _first_that_runs(cls, mapping)
    except Exception as e:
        return Outcome(mapping, name, FAILED, _line(e))
    try:
        fused = _run(patch_model(copy.deepcopy(model)), batch)
        difference = _difference(plain, fused)
    except Exception as e:
        return Outcome(mapping, name, UNTOUCHED, _where(e), f"raises when patched: {_line(e)}")
    outside = ""
    if mapping == "CAUSAL_LM":
        outside, wrong = _outside(model, batch)
        difference = difference or wrong
    option, wrong = _with_option(model, batch)
    how, why = _how(model, plain.seen, fused.seen)
    return Outcome(mapping, name, how, why, difference or wrong, outside=outside, option=option)


def _with_option(model: Any, batch: dict[str, Any]) -> tuple[str, str]:
    """What a model does that is patched with an option: its loss with it or an error, or else the difference."""
    try:
        fused = _run(patch_model(copy.deepcopy(model), label_smoothing=SMOOTHING), batch)
    except Exception as e:
        return _line(e), ""
    with _Smoothed(model):
        difference = _difference(_run(copy.deepcopy(model), batch), fused)
    return ("no", f"with label_smoothing: {difference}") if difference else (APPLIED, "")


def _outside(model: Any, batch: dict[str, Any]) -> tuple[str, str]:
    """How a loss that is taken after a forward without labels fares, and the difference that it makes."""
    try:
        plain = _run(copy.deepcopy(model), batch, outside=True)
    except Exception as e:
        return f"not run: {_line(e)}", ""
    try:
        fused = _run(patch_model(copy.deepcopy(model)), batch, outside=True)
    except Exception as e:
        return "no", f"raises with its loss outside: {_line(e)}"
    difference = _difference(plain, fused)
    if difference:
        return "no", f"with its loss outside: {difference}"
    if fused.seen.reads:
        return f"equal, logits read by {', '.join(dict.fromkeys(fused.seen.reads))}", ""
    return ("equal, fused" if fused.seen.linear else "equal, not deferred"), ""


def _first_that_runs(cls: Any, mapping: str) -> tuple[Any, dict[str, Any], _Run]:
    """(model, batch, run) of the first scale and batch that run; if none does, raises the first error."""
    first: Exception | None = None
    keys = (cls.config_class.model_type, cls.__name__)
    config, inputs = ({k: v for key in keys for k, v in table.get(key, {}).items()} for table in _TABLES)
    config.setdefault("num_labels", 2 if mapping == "QUESTION_ANSWERING" else NUM_LABELS)
    for scale in LADDER:
        try:
            model = tiny(cls, scale, config)
            for batch in batches(model, mapping, inputs):
                try:
                    return model, batch, _run(copy.deepcopy(model), batch)
                except Exception as e:
                    first = first or e
        except Exception as e:
            first = first or e
    assert first is not None
    raise first


_TABLES = (overrides.CONFIG, overrides.INPUTS)


@dataclass
class Seen:
    """How the losses of one forward and backward were computed.

    `linear`, `logits` and `original` (PyTorch's) have each loss's number of classes, `others` the names of other
    losses, and `reads` the operations that read logits.
    """

    linear: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    original: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)


class _Run(NamedTuple):
    loss: float
    grads: dict[str, Tensor | None]
    logits: Tensor | None
    seen: Seen


def _run(model: Any, batch: dict[str, Any], outside: bool = False) -> _Run:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    with _watched() as seen:
        loss: Any
        if outside:
            outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
            loss = _next_token_loss(outputs["logits"], batch["labels"])
        else:
            outputs = model(**batch)
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        if not isinstance(loss, Tensor) or not math.isfinite(loss):
            raise ValueError(f"the model's own loss is {loss}")
        loss.backward()
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    with torch.no_grad():
        logits = logits.detach() + 0 if isinstance(logits, Tensor) else None
    return _Run(loss.item(), {n: p.grad for n, p in model.named_parameters()}, logits, seen)


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} are not for labels {tuple(labels.shape)}")
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@contextlib.contextmanager
def _watched() -> Iterator[Seen]:
    seen = Seen()

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        seen.linear.append(args[1].shape[0])
        return fused_linear_cross_entropy(*args, **kwargs)

    def on_logits(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.logits.append(input.shape[input.dim() > 1])
        return fused_cross_entropy(input, *args, **kwargs)

    def computed(self: Any) -> Tensor:
        seen.reads.append(_reader())
        return logits(self)

    fused_linear_cross_entropy = deferred_affine.fused_linear_cross_entropy
    fused_cross_entropy = deferred_loss.fused_cross_entropy
    logits = deferred_product.Product.logits
    with (
        mock.patch.object(deferred_affine, "fused_linear_cross_entropy", linear),
        mock.patch.object(deferred_loss, "fused_cross_entropy", on_logits),
        mock.patch.object(deferred_product.Product, "logits", computed),
        _Originals(seen),
    ):
        yield seen


class _Originals(TorchFunctionMode):
    """Records the losses that PyTorch computes. For a patched model, these are those that its own mode lets through."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss):
            self.seen.original.append(args[0].shape[args[0].dim() > 1])
        elif getattr(func, "__name__", "").endswith(("_loss", "_loss_nd", "cross_entropy_with_logits")):
            self.seen.others.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Smoothed(TorchFunctionMode):
    """Smooths the labels of PyTorch's cross entropies over a head's classes, or over any if there is no head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.classes = classes_of(output_embeddings(model))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        losses = (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss)  # the cross entropy of their softmax
        if func in losses and self.classes in (None, args[0].shape[args[0].dim() > 1]):
            func, kwargs["label_smoothing"] = losses[0], SMOOTHING
        return func(*args, **kwargs)


def _reader() -> str:
    """The operation that computed deferred logits, and the line of transformers that asked for it."""
    operation, line = "", ""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not line:
        if frame.f_code.co_name == "__torch_function__" and "name" in frame.f_locals:
            operation = operation or frame.f_locals["name"]
        elif frame.f_code.co_name == "cross_entropy":
            operation = operation or "cross_entropy"
        path = Path(frame.f_code.co_filename)
        if "transformers" in path.parts:
            line = f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{operation or 'the graph'} ({line or 'backward'})"


def _how(model: Any, plain: Seen, fused: Seen) -> tuple[str, str]:
    if not plain.original:
        others = ", ".join(dict.fromkeys(plain.others)) or "none known"
        return UNTOUCHED, f"the model takes no cross entropy (losses: {others})"
    left = f"{len(fused.original)} of {len(plain.original)} cross entropies are PyTorch's"
    if fused.linear and not fused.reads and not set(fused.linear) & {*fused.logits, *fused.original}:
        beside = f"; {len(fused.logits)} more over {fused.logits[0]} classes on logits" if fused.logits else ""
        return LINEAR, (left + beside if fused.original else beside[2:])
    if fused.linear or fused.logits:
        return LOGITS, "; ".join(filter(None, [_why_logits(model, fused), left * bool(fused.original)]))
    return UNTOUCHED, f"a cross entropy over {fused.original[0]} classes; {_head(model)}"


def _why_logits(model: Any, seen: Seen) -> str:
    if seen.reads:
        return f"logits read by {', '.join(dict.fromkeys(seen.reads))}"
    return f"over {seen.logits[0]} classes; {_head(model)}" if seen.logits else ""


def _head(model: Any) -> str:
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        head = None
    weight = getattr(head, "weight", None)
    if weight is None:
        return "no output embeddings" if head is None else f"output embeddings are a {type(head).__name__}"
    return f"output embeddings have {weight.shape[0]} rows"


def _difference(plain: _Run, fused: _Run) -> str:
    """The first violation of RULE; empty if there is none."""
    if not abs(fused.loss - plain.loss) <= LOSS * abs(plain.loss):
        return f"loss {fused.loss:.7g}, should be {plain.loss:.7g}"
    largest = max((g.abs().max().item() for g in plain.grads.values() if g is not None and g.numel()), default=0.0)
    for name, expected in plain.grads.items():
        actual = fused.grads[name]
        if (actual is None) != (expected is None):
            return f"gradient of {name} is {'None' if actual is None else 'not None'}"
        if actual is not None and expected is not None and (excess := _excess(actual, expected, largest)):
            return f"gradient of {name}: {excess}"
    if plain.logits is not None and fused.logits is not None and plain.logits.numel():
        excess = _excess(fused.logits, plain.logits, plain.logits.abs().max().item())
        return excess and f"logits: {excess}"
    return "logits are missing" if plain.logits is not None and fused.logits is None else ""


def _excess(actual: Tensor, expected: Tensor, largest: float) -> str:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{tuple(actual.shape)} {actual.dtype}, should be {tuple(expected.shape)} {expected.dtype}"
    if not expected.numel():
        return ""
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    allowed = GRAD * size + FLOOR * largest + ROUNDING
    return "" if error <= allowed else f"off by {error:.3g}, largest element {size:.3g}"


def _line(e: BaseException) -> str:
    """An error in one line of a table."""
    text = f"{type(e).__name__}: {e}".split(" but it was not found")[0]
    text = re.sub(r"(?<![\w:/])(/[\w.@+-]+){2,}/", "", text)  # files without their folders
    text = re.sub(r"\s+", " ", text).replace("|", "/")
    return text if len(text) <= 200 else text[:197] + "..."


def _where(e: BaseException) -> str:
    trace = e.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
