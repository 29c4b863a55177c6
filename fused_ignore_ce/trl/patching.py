"""One call for TRL's trainers: their log-probabilities and entropies are computed by this package.

TRL gives the model that it trains a head of its own, which computes per-token results from hidden states, and each of
its trainers takes its loss and its metrics from them. `patch_trainer` replaces the function in that head. What comes
before and after it is TRL's own code: the loss, the metrics, auxiliary losses, gradient accumulation.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.eager import autocasts
from ..core.optional_packages import needed
from ..core.options import budget_bytes, check_backend, check_logits_dtype
from ..deferred.heads import PATCH
from ..deferred.product import product_of
from ..deferred.replaced import forward_of
from ..hf.forward import recorder_of, state_in
from ..hf.patching import patch_model, unpatch_model
from .distillation import patch_distillation, refuse_partitioned, unpatch_distillation
from .per_token import Head, PerToken, per_token

#: Releases of TRL whose head is known, by "major.minor".
KNOWN_VERSIONS = ("1.16",)
#: Module and name of the forward that TRL gives a model along with the head.
_TRLS = ("trl.trainer.utils", "_fused_forward")


def patch_trainer(
    trainer: Any,
    *,
    memory_budget: int | str | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Any:
    """Lets a trainer of TRL take its log-probabilities and entropies from this package.

    Equivalent to the same trainer with `trl.kernels.ChunkedLogProbFunction` replaced by `fused_linear_log_probs`: the
    loss, its gradients and the metrics are the same.

    Args:
        trainer: an SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer, before `train()` or after it. Its
            model and its reference model are changed in place. Or a DistillationTrainer or GKDTrainer, whose divergence
            is then `fused_linear_distillation_loss` or, as the latter has logits, `fused_distillation_loss`.
        memory_budget: bytes of scratch, as in `fused_linear_cross_entropy`.
        logits_dtype: torch.float32 for logits of 16-bit models that are never rounded to 16 bits, as in
            `fused_linear_log_probs`; None rounds them as TRL's head does.
        backend: "auto", "triton" or "torch".

    Returns:
        trainer. `fused_ignore_ce.hf.fusion_report(trainer.model)` tells what was fused.

    Raises:
        RuntimeError: a version of TRL that is not known. In a forward: a head that DeepSpeed's ZeRO-3 partitions.
        TypeError: a trainer whose model does not have TRL's head.
        ValueError: an option out of its range.

    Note:
        An SFTTrainer with loss_type="nll" costs three matrix products of the head's size, other losses four, as their
        gradients are known in backward only. A loss that SFTTrainer takes of logits (`label_smoothing_factor`,
        `compute_loss_func`) is fused by `patch_model(model)`, which this calls then, unless the
        model is patched already. A model that was saved and loaded again is not patched.

    Examples:
        >>> from trl import SFTConfig, SFTTrainer  # doctest: +SKIP
        >>> trainer = patch_trainer(SFTTrainer(model, SFTConfig("output"), train_dataset=dataset))  # doctest: +SKIP
    """
    utils = _trl_utils()
    check_backend(backend)
    check_logits_dtype(logits_dtype)
    options: dict[str, Any] = {"memory_budget": budget_bytes(memory_budget), "logits_dtype": logits_dtype}
    options["backend"] = backend
    if patch_distillation(trainer, options):
        return trainer
    models = _models_of(trainer)
    trained = models[0]
    for model in models:
        _patches[model] = _Patch(options, summed=model is trained and _sums(trainer))
        recorder_of(model, fresh=True)
        if not any(_is(function, __name__, "forward_with_head") for function in _functions(model.forward)):
            model.forward = _with_head(model, forward_of(model))
    if _takes_logits(trainer) and (trained in _patched_here or PATCH not in trained.__dict__):
        patch_model(trained, **options)
        _patched_here.add(trained)
    if not isinstance(utils._ChunkedLogProbFunction, _LogProbs):
        utils._ChunkedLogProbFunction = _LogProbs(utils._ChunkedLogProbFunction)
        utils._use_triton = _OnlyKept(utils._use_triton)
    return trainer


def unpatch_trainer(trainer: Any) -> Any:
    """Undoes `patch_trainer`; without effect on a trainer that is not patched. Returns trainer."""
    utils = _trl_utils()
    if unpatch_distillation(trainer):
        return trainer
    for model in _models_of(trainer):
        _patches.pop(model, None)
        if model in _patched_here:
            _patched_here.remove(model)
            unpatch_model(model)
        own = forward_of(model)
        if _is(own, __name__, "forward_with_head"):  # inside other wrappers (accelerate's) it stays, and does nothing
            model.forward = MethodType(own.__wrapped__, model) if hasattr(own, "__self__") else own.__wrapped__
    if not _patches and isinstance(utils._ChunkedLogProbFunction, _LogProbs):
        utils._ChunkedLogProbFunction = utils._ChunkedLogProbFunction.own
        utils._use_triton = utils._use_triton.own
    return trainer


class _Patch(NamedTuple):
    """The arguments of `patch_trainer`, and what it found out about the trainer."""

    options: dict[str, Any]
    summed: bool  # whether the trainer's loss is the sum of the log-probabilities, times a number


#: The patches, by patched model.
_patches: weakref.WeakKeyDictionary[nn.Module, _Patch] = weakref.WeakKeyDictionary()

#: Models that `patch_trainer` gave to `patch_model`.
_patched_here: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Call(NamedTuple):
    """A call of a patched model; `tokens` is how many tokens TRL's head predicts, ignored ones included."""

    model: nn.Module
    patch: _Patch
    tokens: int


class _Running(threading.local):
    call: _Call | None = None


_running = _Running()


def _with_head(model: nn.Module, forward: Any) -> Any:
    """A model's forward; while it runs, TRL's head, which it calls, knows the model and its patch."""
    bound = getattr(forward, "__self__", None) is model
    function = forward.__func__ if bound else forward

    @functools.wraps(function)
    def forward_with_head(*args: Any, **kwargs: Any) -> Any:
        this = args[0] if bound else model
        patch = _patches.get(this) if kwargs.get("fused_lm_head") else None
        outer, _running.call = _running.call, None if patch is None else _Call(this, patch, _positions(**kwargs))
        try:
            return function(*args, **kwargs)
        finally:
            _running.call = outer

    return MethodType(forward_with_head, model) if bound else forward_with_head


def _positions(labels: Tensor | None = None, shift_labels: Tensor | None = None, **_: Any) -> int:
    """How many tokens TRL's head predicts, ignored ones included."""
    targets = shift_labels if shift_labels is not None else labels
    if targets is None:
        raise ValueError("labels: expected a Tensor of labels with fused_lm_head=True, got None")
    return targets.numel() if shift_labels is not None else targets[..., 1:].numel()


class _LogProbs(NamedTuple):
    """Takes the place of TRL's `ChunkedLogProbFunction`, and calls it for models that are not patched."""

    own: Any

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
        call = _running.call
        if call is None:
            return self.own.apply(hidden, weight, bias, targets, *rest)
        return _per_token(call, hidden, weight, bias, targets, *rest)


class _OnlyKept(NamedTuple):
    """Takes the place of TRL's `_use_triton`, which decides whether its head gets the kept tokens or all."""

    own: Any

    def __call__(self, device: torch.device) -> bool:
        return self.own(device) or (_running.call is not None and device.type == "cpu")


def _per_token(
    call: _Call,
    hidden: Tensor,
    weight: Any,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> PerToken:
    """What TRL's function returns for these arguments."""
    refuse_partitioned(weight)
    if not autocasts(hidden.device):  # as TRL's function, which computes in hidden's dtype
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    head = Head(hidden, weight, bias, softcap, logit_scale, temperature)
    found = per_token(head, targets, outputs, call.patch.summed, call.patch.options)
    shared = state_in(call.model)
    shared.size += call.tokens * len(weight) * product_of(hidden, weight, bias).dtype.itemsize
    kind = "summed log_probs of TRL" if call.patch.summed else "log_probs of TRL"
    shared.took(kind, call.tokens, torch.tensor(call.tokens - len(targets)))
    return found


def _trl_utils() -> Any:
    """TRL's module that has the head, of a version that is known."""
    trl = needed("trl", "trl")
    if trl.__version__.rpartition(".")[0] not in KNOWN_VERSIONS:
        raise RuntimeError(
            f"trl: expected a release of {', '.join(KNOWN_VERSIONS)}, whose head is known, got {trl.__version__}; "
            "install one of them, or use patch_model(model), which needs no known version "
            "where the trainer takes its loss of the model's logits"
        )
    return needed("trl.trainer.utils", "trl")


def _models_of(trainer: Any) -> list[Any]:
    """The model that is trained, and the reference model if there is one: those that have TRL's head."""
    found: list[Any] = []
    for name in ("model", "ref_model"):
        around = getattr(trainer, name, None)
        inner = around.modules() if isinstance(around, nn.Module) else ()
        with_head = [m for m in inner if "forward" in m.__dict__ and any(_is(f, *_TRLS) for f in _functions(m.forward))]
        if name == "model" and not with_head:
            raise TypeError(
                "trainer: expected a trainer of TRL that gives its model a fused head (SFTTrainer, DPOTrainer, "
                "KTOTrainer, GRPOTrainer, RLOOTrainer), or one that distils (DistillationTrainer, GKDTrainer), got "
                f"{type(trainer).__name__}"
            )
        found += with_head
    return found


def _functions(forward: Any) -> Iterator[Any]:
    """A model's forward and what it wraps, from the outermost."""
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _is(function: Any, module: str, name: str) -> bool:
    """Whether a function's code is that of a certain module; decorators copy a function's name, not its code."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_name == name and function.__globals__["__name__"] == module


def _sums(trainer: Any) -> bool:
    """Whether the trainer's loss is the sum of the log-probabilities, and its entropies get no gradients."""
    from trl import SFTTrainer

    return getattr(type(trainer), "compute_loss", None) is SFTTrainer.compute_loss and trainer.args.loss_type == "nll"


def _takes_logits(trainer: Any) -> bool:
    """Whether the trainer's loss is taken of logits, and not of the results of TRL's head."""
    from trl import SFTTrainer

    return isinstance(trainer, SFTTrainer) and (trainer.label_smoother or trainer.compute_loss_func) is not None
