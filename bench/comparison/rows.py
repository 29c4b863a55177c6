"""The rows of the comparison, as data. An answer comes from a check, or from a package's documentation and source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import checks, models

#: An answer from documentation or source: "yes" or "no", and why. Of a peer, it ends with the file that says so. An
#: empty answer says that nobody looked, and that a run on a CPU would not tell.
Stated = tuple[str, str]

UNKNOWN = ("", "")
NOT_OURS = ("no", "not offered")


def _no(where: str) -> Stated:
    return ("no", f"there is no such option; {where}")


CCE, QUACK = "`cce.py`", "`quack/cross_entropy.py`"
QUACK_LINEAR = "`quack/linear_cross_entropy.py`"
NO_QUACK = {"logits": _no(QUACK), "linear": _no(QUACK_LINEAR)}
KEPT_ONLY = ("yes", f"its kernels walk over the kept tokens; {CCE}, `_build_flat_valids`")

#: The versions that answers are about, and where to read them.
SOURCES = {
    "Liger": ("0.8.5", "https://github.com/linkedin/Liger-Kernel"),
    "CCE": ("25.6.4", "https://github.com/apple/ml-cross-entropy/tree/d42911f9b1a1f98289bb601c35c8151562603d74"),
    "QuACK": ("0.6.5", "https://github.com/Dao-AILab/quack"),
    "TRL": ("1.16.0", "https://github.com/huggingface/trl"),
    "PyTorch": ("2.13.0", "https://docs.pytorch.org/docs/stable/"),
}


@dataclass(frozen=True)
class Row:
    """A question that has a yes or a no for each package."""

    question: str
    check: Callable[..., None] | None
    kinds: tuple[str, ...]
    stated: dict[str, dict[str, Stated]]  # answers by kind, then by package
    short: str  # the kind for which the README shows the row; empty if it does not


def _row(question: str, check: Any, *kinds: str, short: str = "", **stated: Stated | dict[str, Stated]) -> Row:
    """A row with the stated answers of packages: one for all of its kinds that they have a loss of, or one by kind."""
    kinds = kinds or ("logits", "linear")
    by_kind: dict[str, dict[str, Stated]] = {kind: {} for kind in kinds}
    for package, answers in stated.items():
        if not isinstance(answers, dict):
            answers = {kind: answers for kind in kinds if (package, kind) != ("CCE", "logits")}
        for kind in by_kind.keys() & answers.keys():
            by_kind[kind][package] = answers[kind]
    return Row(question, check, kinds, by_kind, short)


LOSSES = (
    _row(
        "Several ignored ids in one call", checks.several_ids, short="linear",
        QuACK=("no", f"`ignore_index` is one number; {QUACK}"),
    ),
    _row(
        "Ignored tokens cost no matrix product", checks.skipped, "linear", short="linear", CCE=KEPT_ONLY,
        QuACK=("no", f"every chunk is multiplied whole, and ignored rows are then set to zero; {QUACK_LINEAR}"),
    ),
    _row(
        "An ignored row may hold NaN", checks.ignored_nan, CCE=KEPT_ONLY,
        QuACK={
            "logits": ("no", f"backward multiplies the row's probabilities by zero; {QUACK}"),
            "linear": ("no", f"the gradient of the head multiplies the row by zero; {QUACK_LINEAR}"),
        },
    ),
    _row(
        "The caller's logits are not overwritten", checks.untouched, "logits", short="logits",
        QuACK=("yes", f"`inplace_backward` is off by default; {QUACK}"),
    ),
    _row(
        "Correct gradients of a scaled loss, also in a second backward", checks.upstream, short="linear",
        CCE=("yes", f"backward computes the gradient anew; it leaves out entries below a threshold; {CCE}"),
        QuACK={
            "logits": ("yes", f"backward computes the gradient anew; {QUACK}"),
            "linear": ("no", f"backward scales the saved gradient in place; {QUACK_LINEAR}"),
        },
    ),
    _row(
        "`reduction=\"none\"` with a gradient for each token", checks.per_token,
        QuACK={
            "logits": ("yes", f"`reduction`; {QUACK}"), "linear": ("no", f"\"mean\" and \"sum\" only; {QUACK_LINEAR}")
        },
    ),
    _row(
        "The loss of each token beside the mean, from one pass", checks.token_loss, short="linear",
        QuACK={"logits": ("no", f"one value; {QUACK}"), "linear": ("no", f"one value; {QUACK_LINEAR}")},
    ),
    _row("Label smoothing", checks.smoothing, short="linear", QuACK=NO_QUACK),
    _row(
        "Class weights", checks.class_weights,
        QuACK={"logits": ("yes", f"`weight`; {QUACK}"), "linear": _no(QUACK_LINEAR)},
    ),
    _row(
        "Softcap, correct for any size of the vocabulary", checks.softcap, short="linear", QuACK=NO_QUACK,
        CCE=("no", "the cap is applied after the mask: lanes past the vocabulary count as -cap, not as -inf; "
             "`cce_lse_forward.py`"),
    ),
    _row("z-loss", checks.z_loss, QuACK=NO_QUACK),
    _row("Class probabilities as targets", checks.probabilities, QuACK=("no", f"targets are integers; {QUACK}")),
    _row("Token accuracy from the same pass", checks.accuracy, QuACK=NO_QUACK),
    _row("Entropy of each token, with its gradient", checks.entropy, short="linear", QuACK=NO_QUACK),
    _row("Most of a row's logits may be -inf (a masked vocabulary)", checks.masked_vocabulary, "logits"),
    _row(
        "A batch with every token ignored gives gradients of zero", checks.all_ignored, short="linear",
        CCE=("no", f"backward divides by the number of kept tokens; {CCE}, `1 / lse.numel()`"),
        QuACK={
            "logits": ("yes", f"the upstream gradient of ignored rows is replaced by zero; {QUACK}"),
            "linear": ("no", f"the scale is one divided by the number of kept tokens; {QUACK_LINEAR}"),
        },
    ),
    _row(
        "The gradient is computed with the loss, so that logits are read once", checks.one_pass, "logits",
        PyTorch=("no", "log-probabilities are written, and read in backward; `aten/src/ATen/native/LossNLL.cpp`"),
        Liger=("yes", "always, and written over the logits; `ops/cross_entropy.py`"),
        QuACK=("no", f"only in its linear loss; {QUACK}, `CrossEntropyFunction`"),
    ),
    _row(
        "float16 gradients survive until the loss scale is applied", checks.loss_scale, "logits",
        QuACK=("yes", f"the mean is taken outside of the kernel; {QUACK}"),
    ),
    _row(
        "Logits of bfloat16 operands can be left unrounded", checks.unrounded, "linear", short="linear",
        CCE=("yes", "sums of products stay in float32 in the kernel; `cce_lse_forward.py`, `accum`"),
        TRL=("yes", "for GRPO, by `cast_lm_head_to_fp32`, which holds the head in float32; `trainer/grpo_config.py`"),
        QuACK=("no", f"a chunk of logits has the operands' dtype; {QUACK_LINEAR}"),
    ),
    _row(
        "A target that is out of range is an error", checks.out_of_range,
        CCE=("no", "not checked; `indexed_dot.py`"), QuACK=("no", f"not checked; {QUACK}"),
    ),
    _row("Logits may be transposed", checks.transposed, "logits"),
    _row(
        "A bias of the head", checks.bias, "linear",
        QuACK=("no", f"with a bias, its module takes a plain `F.linear`; {QUACK_LINEAR}"),
    ),
    _row(
        "The head is trained while hidden states are frozen", checks.frozen_hidden, "linear",
        CCE=("yes", "asks whether the head needs its gradient; `cce_backward.py`"),
        QuACK=("yes", f"`need_dw`; {QUACK_LINEAR}"),
    ),
    _row(
        "Distillation: the divergence from a teacher, from the hidden states of both", checks.distillation, "linear",
        short="linear", QuACK=NO_QUACK,
    ),
    _row(
        "Distillation: ignored tokens cost no matrix product", checks.skipped_in_distillation, "linear", QuACK=NO_QUACK
    ),
    _row("Distillation: hard labels mixed in, in one pass", checks.hard_labels, "linear", QuACK=NO_QUACK),
    _row("`torch.compile(fullgraph=True)`", checks.compiled, short="linear", CCE=UNKNOWN),
    _row(
        "Runs on a CPU", checks.on_cpu, short="linear", QuACK=("no", f"CUDA only; {QUACK}"),
    ),
)  # fmt: skip

PATCH = "`transformers/patch.py`"

MODELS = (
    _row(
        "Patched models: `outputs.logits` can be read after training forwards", models.readable_logits, "models",
        short="models", CCE=("no", "`None` is returned instead; README"),
    ),
    _row(
        "Patched models: not limited to a list (tried with GPT-2)", models.any_model, "models", short="models",
        CCE=("no", f"Llama, Phi3, Mistral, Gemma2 and Qwen2; {PATCH}"),
    ),
    _row("Patched models: a head with a bias", models.head_bias, "models"),
    _row("Patched models: LoRA on the head", models.adapted_head, "models", short="models"),
    _row("Patched models: more ignored ids beside -100", models.more_ids, "models", CCE=_no(PATCH)),
    _row("Patched models: one call takes the patch back", models.unpatched, "models", CCE=_no(PATCH)),
    _row(
        "A model of your own with several heads (multi-token prediction)", models.several_heads, "models",
        short="models", CCE=("no", f"models of transformers only; {PATCH}"),
    ),
)  # fmt: skip

#: Questions that no check can decide on a CPU. All answers, ours too, come from documentation or source.
STATED = (
    _row(
        "Speed was measured on a GPU, and published", None, "package", short="package",
        fused_ignore_ce=("no", "only predicted from machine code; bench/gpu.py measures"),
        Liger=("yes", "README and technical report"), CCE=("yes", "README and paper"),
        QuACK=("yes", "README and article"),
    ),
    _row(
        "Also fuses norms, rotary embeddings and activations", None, "package", short="package",
        fused_ignore_ce=NOT_OURS, Liger=("yes", "its main purpose; README"), CCE=("no", "one loss; README"),
        TRL=("no", "losses only; `trl/kernels`"), QuACK=("yes", "norms, softmax, matrix products; README"),
    ),
    _row(
        "Whole preference losses are fused (DPO, ORPO, KTO, GRPO)", None, "package", short="package",
        fused_ignore_ce=("no", "log-probabilities and entropies for them, and TRL's trainers patched"),
        PyTorch=("no", "not among its losses; documentation"), Liger=("yes", "`liger_kernel/chunked_loss`"),
        CCE=("no", "per-token losses for them; README"), QuACK=("no", "not among its functions; README"),
        TRL=("no", "its trainers compute them from chunked log-probabilities; `trainer/dpo_trainer.py`"),
    ),
    _row(
        "A teacher that is known by its likeliest tokens only", None, "package",
        fused_ignore_ce=("yes", "`fused_top_k_distillation_loss`"),
        PyTorch=("no", "not among its losses; documentation"),
        Liger=("no", "`chunked_loss` and `ops` take a teacher's hidden states or all of its logits"),
        TRL=("yes", "experimental, and of logits that are there; `experimental/server_distillation`"),
        CCE=("no", "one loss; README"), QuACK=("no", "not among its functions; README"),
    ),
    _row(
        "Not even a tile of logits is written to device memory", None, "package", short="package",
        fused_ignore_ce=("no", "tiles, of a size that you choose; by default one block where that is fastest"),
        PyTorch=("no", "a chunk of tokens at a time; documentation of `LinearCrossEntropyOptions`"),
        Liger=("no", "a chunk of tokens at a time; `ops/fused_linear_cross_entropy.py`"),
        TRL=("no", "a tile at a time; `trl/kernels/chunked_logprob.py`"),
        CCE=("yes", "its purpose: about 1 MB beside the gradients; README"),
        QuACK=("no", f"a chunk of tokens at a time; {QUACK_LINEAR}"),
    ),
    _row(
        "The vocabulary may be sharded over ranks", None, "package", short="package",
        fused_ignore_ce=("yes", "`process_group=` or DTensors, tested on two to four processes"),
        PyTorch=("yes", "`loss_parallel`, of logits, without label smoothing; documentation"),
        TRL=("no", "a sharded head is gathered; `trainer/utils.py`, `full_tensor()`"),
        Liger=("yes", "of logits by `LigerVocabParallelCrossEntropy`, from hidden states (equal shards, CUDA) by "
               "`ops/fused_linear_scaled_cross_entropy.py`"),
        CCE=("yes", "`vocab_parallel_options`, in its repository and not in the release 25.1.1; README"),
        QuACK=("no", f"no process group; {QUACK_LINEAR}"),
    ),
    _row(
        "The default of its own trainers", None, "package",
        fused_ignore_ce=NOT_OURS,
        TRL=("yes", "SFT, DPO, KTO, GRPO and RLOO; it drops ignored rows on CUDA and XPU devices; `trainer/utils.py`"),
        Liger=("no", "`use_liger_kernel` of transformers' Trainer is off by default; documentation"),
    ),
    _row(
        "Plugs into Megatron-LM", None, "package",
        fused_ignore_ce=NOT_OURS, Liger=("yes", "`liger_kernel/megatron`"),
    ),
    _row(
        "The same bits from run to run on a GPU", None, "package",
        fused_ignore_ce=("yes", "no atomics"), Liger=("yes", "no atomics; `ops/cross_entropy.py`"),
        CCE=("no", "locks and atomic additions in an order that changes; `cce_lse_forward.py`, `cce_backward.py`"),
    ),
    _row(
        "AMD GPUs", None, "package",
        fused_ignore_ce=("no", "compiled for gfx942 and gfx950, never run"), Liger=("yes", "README"),
        PyTorch=("yes", "its ROCm build; documentation"), QuACK=("no", "written in NVIDIA's CuTe; README"),
    ),
)  # fmt: skip

ALL = (*LOSSES, *MODELS, *STATED)
