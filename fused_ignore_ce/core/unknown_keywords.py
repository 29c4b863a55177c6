"""Errors for unknown keywords, which say what to write. A leaf: it imports nothing of this package.

Other packages and models have other names for the same options, and options that mean nothing here.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Other names of our options. A name is looked up only where the function has the option.
_OTHER_NAMES = {
    "input": ("_input", "logits", "hidden_states", "hidden", "e"),
    "hidden_states": ("input", "hidden", "e"),
    "target": ("targets", "labels"),
    "labels": ("target", "targets"),
    "linear_weight": ("lin_weight", "lm_head_weight", "classifier", "c"),
    "linear_bias": ("bias", "lin_bias", "lm_head_bias"),
    "weight": ("ce_weight", "class_weight", "class_weights"),
    "ignore_index": ("ignore_idx", "ignored_index", "ignore_id", "ignore_indices"),
    "label_smoothing": ("smoothing", "label_smoothing_factor"),
    "softcap": ("soft_cap", "logit_softcap", "logits_softcap", "logits_soft_cap", "logit_softcapping",
                "final_logit_softcapping"),
    "logit_scale": ("logit_scaling", "logits_scale"),
    "z_loss": ("lse_square_scale", "z_loss_multiplier", "z_loss_weight", "zloss"),
    "token_weight": ("token_weights", "loss_weight", "loss_weights", "loss_mask", "use_token_scaling"),
    "normalizer": ("num_items_in_batch", "divisor", "loss_divisor"),
    "num_items_in_batch": ("normalizer", "num_items"),
    "num_tokens": ("tokens", "n_tokens"),
    "num_ignored": ("ignored", "ignored_tokens"),
    "num_classes": ("vocab_size", "classes"),
    "num_features": ("hidden_size", "features"),
    "memory_budget": ("chunk_size", "num_chunks", "chunks", "max_memory", "budget", "options"),
    "inplace_backward": ("inplace",),
    "return_stats": ("return_lse", "return_z_loss", "return_token_accuracy", "return_predicted_tokens"),
    "loss_dtype": ("out_dtype", "output_dtype"),
    "reduction": ("reduce", "size_average"),
    "process_group": ("tp_group", "vocab_parallel_options"),
    "backend": ("impl", "implementation"),
}  # fmt: skip

_ALWAYS_FLOAT32 = "leave it out: sums are float32 for 16-bit tensors, and loss_dtype is the dtype of the loss"
_ALWAYS_EXACT = "leave it out: gradients are exact, and none is filtered"
_OF_ITS_OWN = "leave it out: forward computes it from the logits that it reads, so that it belongs to their rounding"

#: Advice for options that have no counterpart here.
_ADVICE = {
    "accum_dtype": _ALWAYS_FLOAT32,
    "accum_e_fp32": _ALWAYS_FLOAT32,
    "accum_c_fp32": _ALWAYS_FLOAT32,
    "filter_eps": _ALWAYS_EXACT,
    "filter_e_grad": _ALWAYS_EXACT,
    "filter_c_grad": _ALWAYS_EXACT,
    "lse": _OF_ITS_OWN,
    "precomputed_lse": _OF_ITS_OWN,
    "token_weight": "it belongs to one batch: pass it with the batch; where a patched model takes the loss, take it "
    "of outputs.logits by F.cross_entropy(..., reduction='none'), which is fused, and weigh that",
    "normalizer": "it belongs to one batch: pass it with the batch",
    "shift": "shift the labels, or call fused_causal_lm_loss or fused_linear_causal_lm_loss, which shift them",
    "temperature": "pass logit_scale=1 / temperature; fused_linear_log_probs has a temperature after the softcap",
    "logits_scaling": "it divides the logits: pass logit_scale=1 / logits_scaling",
    "chunk_size": "leave it out: logits that are there need no chunks; fused_linear_cross_entropy has memory_budget",
}


def meaning(name: str, known: Sequence[str]) -> str | None:
    """What an unknown keyword may mean, for a function that takes the `known` ones; None if there is no guess."""
    for ours in known:
        if name in _OTHER_NAMES.get(ours, ()):
            return f"its name here is {ours!r}"
    if name in _ADVICE:
        return _ADVICE[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"did you mean {near[0]!r}?" if near else None


def unknown_keyword(function: str, name: str, known: Sequence[str]) -> str:
    """The message of a TypeError for an unknown keyword."""
    told = meaning(name, known) or f"expected one of {', '.join(known)}"
    return f"{function}() got an unexpected keyword argument {name!r}; {told}"


# difflib cannot be traced. This is all that torch.compiler.assume_constant_result does, but that would import the
# compiler, and with it Triton, for everybody.
unknown_keyword._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark that Dynamo reads


def explains_keywords(function: _Function, also: Iterable[str] = ()) -> _Function:
    """A decorator that makes the TypeError for an unknown keyword say what to write instead.

    `also` are keywords that the function takes by `**`.
    """
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = (*(name for name in names if name != "self"), *also)
    every, called = frozenset(known), function.__qualname__

    @functools.wraps(function)
    def explained(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in every:
                raise TypeError(unknown_keyword(called, name, known))
        return function(*args, **kwargs)

    return cast(_Function, explained)
