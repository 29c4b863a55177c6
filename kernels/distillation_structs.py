"""The named tuples of distillation kernels, beside those of `structs.py`.

N rows of V classes have two distributions at a temperature: the student's q, of logits x, and the teacher's p. Hard
labels and statistics also need the student's distribution at temperature 1.
"""

from typing import Any, NamedTuple


class Mix(NamedTuple):
    """What the loss of a row is made of, known at compile time."""

    KIND: str  # "forward_kl", "reverse_kl" or "jsd"
    HARD: bool  # a cross entropy is mixed in
    APART: bool  # the student's distribution at temperature 1 is needed, and the temperature is another
    ONE_CLASS: bool  # the gradient is 0, whatever the logits are


class PairLogits(NamedTuple):
    """The logits of both sides."""

    x: Any  # (N, V)
    teacher: Any  # (N, V)


class PairStrides(NamedTuple):
    """The strides of logits (N, V) and of the gradient: of rows, then of classes."""

    x_n: Any
    x_v: Any
    teacher_n: Any
    teacher_v: Any
    dx_n: Any
    dx_v: Any
    scale_n: Any  # of the factors of rows


class PairRows(NamedTuple):
    """The results of rows; without statistics, kernels get None for the last three, without backward for `saved`."""

    loss: Any  # (N,)
    saved: Any  # (7, N): c and s of q and of p, `mean`, c and s at temperature 1; -s in far rows
    lse: Any  # (N,)
    predicted: Any  # (N,) int64
    entropy: Any  # (N,)


class Side(NamedTuple):
    """What a program reads of one side, and how its logits are used."""

    inputs: Any  # RowInputs
    options: Any  # LossOptions, of which only the curve is read: that of the logits divided by the temperature


class PairLanes(NamedTuple):
    """The sums over the classes of each lane, as in `LaneSums`, relative to the shifts c."""

    c_q: Any
    s_q: Any
    c_p: Any
    s_p: Any
    kl: Any  # sum of 2^(y_p - c_p) ((y_p - c_p) - (y_q - c_q)); with q and p exchanged for the reverse divergence
    c: Any  # of the student at temperature 1
    s: Any
    d: Any  # of its entropy
    best: Any
    at: Any


class Normaliser(NamedTuple):
    """The sum of a row's powers, as in `RowSums`."""

    c: Any
    s: Any
    far: Any


class Logarithm(NamedTuple):
    """How a logit becomes log2 of its probability: `(u height - c) unit - log_s`."""

    height: Any
    c: Any
    unit: Any  # 1 but in far rows
    log_s: Any


class KnownRow(NamedTuple):
    """What is known of a row once its sums are."""

    q: Normaliser
    p: Normaliser
    ones: Normaliser  # of the student at temperature 1
    mean: Any  # of bits that the gradient contains, see `divergence.py`


class PairTerms(NamedTuple):
    """The numbers of a row that its gradient is computed from; without a suffix, of the student at temperature 1."""

    height_q: Any
    c_q: Any
    height_p: Any
    c_p: Any
    height: Any
    c: Any
    s: Any
    g_q: Any  # the divergence's gradient of the used logits at the temperature; over s unless probabilities are formed
    g_p: Any
    g_hard: Any  # of the cross entropy, over s
    mean: Any  # a quarter of it for reverse_kl
    log_q: Logarithm
    log_p: Logarithm
    target: Any


class OtherRows(NamedTuple):
    """The results of rows without the classes that a teacher names; kernels get None for statistics without them."""

    saved: Any  # (2 or 3, N): the largest used logit without the cap, and for each temperature the sum relative to it
    predicted: Any  # (N,) int64
    entropy: Any  # (N,)


class OtherLanes(NamedTuple):
    """The sums over the classes of each lane, relative to the largest used logit."""

    best: Any  # that logit
    at: Any  # the first class of the tile that has it
    s: Any
    s_two: Any  # at the second temperature
    d: Any  # of the entropy at the last one
