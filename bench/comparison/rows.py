"""The rows of the comparison, as data. An answer comes from a check, or from a package's documentation and source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import checks, models

#: An answer from documentation or source: "yes" or "no", and why.
Stated = tuple[str, str]

NO_OPTION = ("no", "there is no such option")
NO_IDS = ("no", "`ignore_index` is one number")
NO_PROBS = ("no", "targets are integers")
NOT_OURS = ("no", "not offered")
KEPT_ONLY = ("yes", "its kernels walk over the kept tokens")

#: The versions that the stated answers are about, and where to read them.
SOURCES = {
    "Liger": ("0.8.5", "https://github.com/linkedin/Liger-Kernel"),
    "CCE": ("25.1.1", "https://github.com/apple/ml-cross-entropy"),
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
        for kind, answer in answers.items():
            by_kind[kind][package] = answer
    return Row(question, check, kinds, by_kind, short)


LOSSES = (
    _row("Several ignored ids in one call", checks.several_ids, short="linear", CCE=NO_IDS, QuACK=NO_IDS),
    _row(
        "Ignored tokens cost no matrix product", checks.skipped, "linear", short="linear", CCE=KEPT_ONLY,
        QuACK=("no", "every chunk is multiplied whole, and ignored rows are then set to zero"),
    ),
    _row(
        "An ignored row may hold NaN", checks.ignored_nan, CCE=KEPT_ONLY,
        QuACK={
            "logits": ("no", "backward multiplies the row's probabilities by zero"),
            "linear": ("no", "the gradient of the head multiplies the row by zero"),
        },
    ),
    _row(
        "The caller's logits are not overwritten", checks.untouched, "logits", short="logits",
        QuACK=("yes", "`inplace_backward` is off by default"),
    ),
    _row(
        "Correct gradients of a scaled loss, also in a second backward", checks.upstream, short="linear",
        CCE=("yes", "backward computes the gradient anew; it leaves out entries below a threshold"),
        QuACK={
            "logits": ("yes", "backward computes the gradient anew"),
            "linear": ("no", "backward scales the saved gradient in place"),
        },
    ),
    _row(
        "`reduction=\"none\"` with a gradient for each token", checks.per_token, CCE=("yes", "`reduction`"),
        QuACK={"logits": ("yes", "`reduction`"), "linear": ("no", "\"mean\" and \"sum\" only")},
    ),
    _row("Label smoothing", checks.smoothing, short="linear", CCE=NO_OPTION, QuACK=NO_OPTION),
    _row(
        "Class weights", checks.class_weights, CCE=NO_OPTION,
        QuACK={"logits": ("yes", "`weight`"), "linear": NO_OPTION},
    ),
    _row(
        "Softcap, correct for any size of the vocabulary", checks.softcap, short="linear", QuACK=NO_OPTION,
        CCE=("no", "the cap is applied after the mask: lanes past the vocabulary count as -cap, not as -inf"),
    ),
    _row("z-loss", checks.z_loss, CCE=NO_OPTION, QuACK=NO_OPTION),
    _row("Class probabilities as targets", checks.probabilities, CCE=NO_PROBS, QuACK=NO_PROBS),
    _row("Token accuracy from the same pass", checks.accuracy, CCE=NO_OPTION, QuACK=NO_OPTION),
    _row("Entropy of each token, with its gradient", checks.entropy, short="linear", CCE=NO_OPTION, QuACK=NO_OPTION),
    _row("Most of a row's logits may be -inf (a masked vocabulary)", checks.masked_vocabulary, "logits"),
    _row(
        "A batch with every token ignored gives gradients of zero", checks.all_ignored, short="linear",
        CCE=("no", "backward divides by the number of kept tokens"),
        QuACK={
            "logits": ("yes", "the upstream gradient of ignored rows is replaced by zero"),
            "linear": ("no", "the scale is one divided by the number of kept tokens"),
        },
    ),
    _row(
        "float16 gradients survive until the loss scale is applied", checks.loss_scale, "logits",
        QuACK=("yes", "the mean is taken outside of the kernel"),
    ),
    _row(
        "A target that is out of range is an error", checks.out_of_range,
        CCE=("no", "not checked"), QuACK=("no", "not checked"),
    ),
    _row("Logits may be transposed", checks.transposed, "logits"),
    _row("A bias of the head", checks.bias, "linear", CCE=NO_OPTION, QuACK=NO_OPTION),
    _row(
        "The head is trained while hidden states are frozen", checks.frozen_hidden, "linear",
        CCE=("yes", "asks whether the head needs its gradient"), QuACK=("yes", "`need_dw`"),
    ),
    _row("`torch.compile(fullgraph=True)`", checks.compiled, short="linear"),
    _row(
        "Runs on a CPU", checks.on_cpu, short="linear",
        CCE=("yes", "with `impl=\"torch_compile\"`, says its README"), QuACK=("no", "CUDA only"),
    ),
)  # fmt: skip

MODELS = (
    _row(
        "Patched models: `outputs.logits` can be read after training forwards", models.readable_logits, "models",
        short="models", CCE=("no", "its README: `None` is returned instead"),
    ),
    _row(
        "Patched models: not limited to a list (tried with GPT-2)", models.any_model, "models", short="models",
        CCE=("no", "its README: Llama, Phi3, Mistral and Gemma2"),
    ),
    _row("Patched models: a head with a bias", models.head_bias, "models"),
    _row("Patched models: LoRA on the head", models.adapted_head, "models", short="models"),
    _row("Patched models: more ignored ids beside -100", models.more_ids, "models"),
    _row("Patched models: one call takes the patch back", models.unpatched, "models"),
)  # fmt: skip

#: Questions that no check can decide on a CPU. All answers, ours too, come from documentation or source.
STATED = (
    _row(
        "Speed was measured on a GPU, and published", None, "package", short="package",
        fused_ignore_ce=("no", "only predicted from machine code; bench/gpu.py measures"),
        Liger=("yes", "its README and technical report"), CCE=("yes", "its README and paper"),
        QuACK=("yes", "its README and article"),
    ),
    _row(
        "Also fuses norms, rotary embeddings and activations", None, "package", short="package",
        fused_ignore_ce=NOT_OURS, Liger=("yes", "its main purpose"), CCE=NOT_OURS, TRL=NOT_OURS,
        QuACK=("yes", "norms, softmax, matrix products"),
    ),
    _row(
        "Whole preference losses are fused (DPO, ORPO, KTO, GRPO)", None, "package", short="package",
        fused_ignore_ce=("no", "log-probabilities and entropies for them, and TRL's trainers patched"),
        PyTorch=NOT_OURS, Liger=("yes", "`liger_kernel.chunked_loss`"), CCE=NOT_OURS, QuACK=NOT_OURS,
        TRL=("no", "its trainers compute them from chunked log-probabilities"),
    ),
    _row(
        "Not even a tile of logits is written to device memory", None, "package", short="package",
        fused_ignore_ce=("no", "one tile at a time, of a size that you choose"),
        PyTorch=("no", "a chunk of tokens at a time"), Liger=("no", "a chunk of tokens at a time"),
        TRL=("no", "a tile at a time"), CCE=("yes", "its purpose: about 1 MB beside the gradients"),
        QuACK=("no", "a chunk of tokens at a time"),
    ),
    _row(
        "The vocabulary may be sharded over ranks", None, "package", short="package",
        fused_ignore_ce=("yes", "`process_group=` or DTensors, tested on two to four processes"),
        PyTorch=("yes", "`loss_parallel`; without label smoothing"), TRL=("no", "a sharded head is gathered"),
        Liger=("yes", "`LigerVocabParallelCrossEntropy`"), CCE=NOT_OURS, QuACK=NOT_OURS,
    ),
    _row(
        "Plugs into Megatron-LM", None, "package",
        fused_ignore_ce=NOT_OURS, Liger=("yes", "`liger_kernel.megatron`"),
    ),
    _row(
        "The same bits from run to run on a GPU", None, "package",
        fused_ignore_ce=("yes", "no atomics"), Liger=("yes", "no atomics in its cross entropy"),
        CCE=("no", "locks and atomic additions in an order that changes"),
    ),
    _row(
        "AMD GPUs", None, "package",
        fused_ignore_ce=("no", "compiled for gfx942 and gfx950, never run"), PyTorch=("yes", "its ROCm build"),
        Liger=("yes", "its README"), QuACK=("no", "written in NVIDIA's CuTe"),
    ),
)  # fmt: skip

ALL = (*LOSSES, *MODELS, *STATED)
