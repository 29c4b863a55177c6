"""TRL's trainers that distil: their divergence from the teacher is computed by this package."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..core.eager import autocasts
from ..hf.forward import recorder_of, state_in
from ..losses.distillation import fused_distillation_loss, fused_linear_distillation_loss

#: The module and the name of the function that DistillationTrainer takes its loss from.
_MODULE, _NAME = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"
#: The module of GKDTrainer. A module that nobody has imported has no trainer.
_GKD = "trl.experimental.gkd.gkd_trainer"
#: The kind of loss in a report.
KIND = "divergence of TRL"


class _Running(threading.local):
    """The patched trainer whose loss is being computed, and the options of its patch."""

    trainer: Any = None
    options: dict[str, Any] = {}  # noqa: RUF012 (a thread replaces it and never writes to it)


_running = _Running()
_patched: weakref.WeakSet[Any] = weakref.WeakSet()


def patch_distillation(trainer: Any, options: dict[str, Any]) -> bool:
    """Patches a DistillationTrainer or a GKDTrainer; returns False for another one, and leaves that as it is."""
    module, nothing = sys.modules.get(_MODULE), ()
    classes: Any = (
        getattr(module, "DistillationTrainer", nothing),
        getattr(sys.modules.get(_GKD), "GKDTrainer", nothing),
    )
    distils, has_logits = (isinstance(trainer, each) for each in classes)
    if distils:
        trainer._compute_loss = MethodType(_computing(type(trainer)._compute_loss, options), trainer)
        if not isinstance(getattr(module, _NAME), _Divergence):
            setattr(module, _NAME, _Divergence(getattr(module, _NAME)))
    elif has_logits:
        if options["logits_dtype"] is not None:
            raise ValueError(
                f"logits_dtype: expected None for a GKDTrainer, got {options['logits_dtype']}: its loss is given "
                "logits that the model has rounded already; a DistillationTrainer's is computed from hidden states"
            )
        trainer.generalized_jsd_loss = _of_logits(trainer, options)
    else:
        return False
    _patched.add(trainer)
    recorder_of(_model(trainer), fresh=True)
    return True


def unpatch_distillation(trainer: Any) -> bool:
    """Undoes `patch_distillation`; returns False for a trainer that it did not patch."""
    names = {"_compute_loss", "generalized_jsd_loss"} & set(getattr(trainer, "__dict__", ()))
    if not names:
        return False
    _patched.discard(trainer)
    for name in names:
        delattr(trainer, name)
    module = sys.modules.get(_MODULE)
    own = getattr(module, _NAME, None)
    if not _patched and isinstance(own, _Divergence):
        setattr(module, _NAME, own.own)
    return True


def _model(trainer: Any) -> Any:
    """The model that is trained, without PEFT's wrapper."""
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _computing(compute: Any, options: dict[str, Any]) -> Any:
    """A trainer's `_compute_loss`; while it runs, the divergence knows the trainer and its options."""

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = _running.trainer, _running.options
        _running.trainer, _running.options = self, options
        try:
            return compute(self, *args, **kwargs)
        finally:
            _running.trainer, _running.options = outer

    return compute_loss


class _Divergence:
    """Takes the place of TRL's `_chunked_divergence_loss`, and calls it for trainers that are not patched."""

    def __init__(self, own: Any) -> None:
        self.own, self.signature = own, inspect.signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _running.trainer is None:
            return self.own(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _of_hidden_states(bound.arguments)


def _of_hidden_states(given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What TRL's function returns for these arguments: loss, sum of the student's entropies, number of tokens.

    The temperature is a part of the scales and the caps, so that the entropies are those at this temperature.
    """
    hidden, weight, bias, scale, cap = _side("student", given)
    teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_cap = _side("teacher", given)
    target = torch.where(given["completion_mask"] != 0, 0, -100)
    loss, stats = fused_linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, target, linear_bias=bias, teacher_bias=teacher_bias,
        reduction="sum", softcap=cap, logit_scale=scale, teacher_softcap=teacher_cap,
        teacher_logit_scale=teacher_scale, return_stats=True, loss_dtype=torch.float32, **_divergence(given["beta"]),
        **_running.options,
    )  # fmt: skip
    _tell(_running.trainer, target, stats.num_tokens, 2 * weight.shape[0] * hidden.element_size())
    divisor = given["num_items_in_batch"]
    divisor = stats.num_tokens.clamp(min=1) if divisor is None else divisor
    divisor = divisor.to(loss.device) if isinstance(divisor, Tensor) else divisor
    return loss / divisor, stats.entropy.sum(), stats.num_tokens


def _side(side: str, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, float, float | None]:
    """Hidden states, head, scale and cap of one side, with the temperature in the last two."""
    hidden, temperature, cap = (
        given[name] for name in (f"{side}_hidden_states", "temperature", f"{side}_final_logit_softcapping")
    )
    weight, bias = _head(hidden, given[f"{side}_lm_head_weight"], given[f"{side}_lm_head_bias"])
    return hidden, weight, bias, given[f"{side}_logit_scale"] / temperature, None if cap is None else cap / temperature


def refuse_partitioned(weight: Any) -> None:
    if hasattr(weight, "ds_id"):
        raise RuntimeError(
            "trainer: expected a model whose head has its weight until backward, got one whose head DeepSpeed ZeRO-3 "
            "partitions, so that its weight is gone by then; use ZeRO-2 or FSDP2, or call unpatch_trainer(trainer)"
        )


def _head(hidden: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    """A head's whole weight and bias, in the dtype of its hidden states, as TRL has them."""
    refuse_partitioned(weight)
    weight, bias = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (weight, bias))
    if not autocasts(hidden.device):
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return weight, bias


def _of_logits(trainer: Any, options: dict[str, Any]) -> Any:
    """Takes the place of a GKDTrainer's `generalized_jsd_loss`."""
    own = type(trainer).generalized_jsd_loss

    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if reduction not in ("batchmean", "sum") and num_items_in_batch is None:  # TRL's trainer asks for neither
            found: Tensor = own(student_logits, teacher_logits, labels, beta, temperature, reduction)
            return found
        loss, stats = fused_distillation_loss(
            student_logits, teacher_logits, labels, temperature=temperature, reduction="sum", return_stats=True,
            backend=options["backend"], **_divergence(beta),
        )  # fmt: skip
        target = torch.zeros(student_logits.shape[:-1], dtype=torch.int64) if labels is None else labels
        _tell(trainer, target, stats.num_tokens, 0)
        if num_items_in_batch is not None:
            divisor: Any = num_items_in_batch
        elif reduction == "sum":
            divisor = 1
        else:
            divisor = max(len(student_logits), 1) if labels is None else stats.num_tokens.clamp(min=1)
        divisor = divisor.to(loss.device) if isinstance(divisor, Tensor) else divisor
        found = loss / divisor
        return found

    return generalized_jsd_loss


def _divergence(beta: float) -> dict[str, Any]:
    """TRL's beta as this package's options."""
    if beta in (0.0, 1.0):
        return {"divergence": "reverse_kl" if beta else "forward_kl"}
    return {"divergence": "jsd", "beta": beta}


def _tell(trainer: Any, target: Tensor, kept: Tensor, bytes_a_token: int) -> None:
    """Adds a loss to the report of the trainer's model."""
    shared = state_in(_model(trainer))
    shared.size += target.numel() * bytes_a_token
    shared.took(KIND, target.numel(), target.numel() - kept)
