"""The named tuples that kernels take, build and return, so that nothing in a kernel is read by position.

Triton treats each element of a tuple like an argument of its own: it compiles in None and the number 1, notices which
addresses and numbers are multiples of 16, and passes everything else as a parameter. Real numbers would become float32
in a tuple. They are arguments of their own, as are numbers that must not be specialised on.

The order of a kernel's parameters, fields of tuples included, is part of its machine code: a GPU loads neighbouring
parameters together. So tensors that are used together are neighbours.
Logits have B * T = N rows of V classes. A program has BLOCK_N rows of them at a time.
"""

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """The shape of a tile of logits, see `device_math`."""

    BLOCK_N: int  # rows
    CHUNKS: int
    LANES: int
    WIDTH: int
    BLOCK_V: int  # classes: CHUNKS * LANES * WIDTH. A field, because Triton 3.9 reads nothing else of a tuple.


class Held(NamedTuple):
    """What of a row stays on the chip: pieces in shared memory, and its end, which is no larger, in registers."""

    PIECES: int
    HAS_REST: bool  # read twice: what lies between the pieces and the end, which then is as large as a piece
    HAS_EDGES: bool  # rows may begin or end between multiples of 16 bytes


class Options(NamedTuple):
    """Which options of the loss a kernel is compiled for."""

    HAS_SOFT: bool  # targets are spread over classes, by label smoothing or as probabilities
    HAS_SCALE: bool
    HAS_SOFTCAP: bool  # it absorbs the scale
    HAS_STATS: bool = False  # forward also stores predicted classes and entropies
    ONE_CLASS: bool = False  # there is but one, of probability 1, whatever its logit is; only gradients need this


class Reduction(NamedTuple):
    """What the reduction of rows is compiled for."""

    MEAN: bool
    HAS_NUMBER: bool  # the divisor is a number
    HAS_STATS: bool


class Logits(NamedTuple):
    """Logits, and the probabilities that are their targets unless targets are indices."""

    x: Any  # (B, T, V)
    probs: Any  # (B, T, V) or None


class Targets(NamedTuple):
    """Targets of rows, and class weights; with probabilities, targets only tell which rows are ignored."""

    target: Any  # (N,) int64
    weight: Any  # (V,) or None


class Rows(NamedTuple):
    """The results of rows; without statistics, kernels get None for the last two."""

    loss: Any  # (N,)
    lse: Any  # (N,) or None
    norm: Any  # (3, N): c, s (-s in far rows) and mass, see `sums`
    predicted: Any  # (N,) int64 or None
    entropy: Any  # (N,) or None


class Saved(NamedTuple):
    """The results of rows that backward reads."""

    norm: Any  # (3, N)
    entropy: Any  # (N,); None unless the entropy has a gradient


class Part(NamedTuple):
    """Where the sums over a part of each row are stored: views that begin at this part."""

    partial: Any  # (5, parts, N): largest used logit without the cap, s, r / 4, mass and d, see `sums`
    argmax: Any  # (parts, N) int64
    stride_field: Any  # of the five fields


class Parts(NamedTuple):
    """The sums over all parts of each row."""

    partial: Any  # (5, count, N)
    argmax: Any  # (count, N) int64
    count: Any


class Place(NamedTuple):
    """The classes that a program has: those of a split of its rows, which may be a block of a larger vocabulary."""

    splits: Any  # per row
    split_tiles: Any  # tiles per split
    first_class: Any  # of the block
    classes: Any  # of the whole vocabulary


class Upstream(NamedTuple):
    """The gradients of rows' results, and the factors of dloss; or the strides of these tensors."""

    dloss: Any  # (N,) or a scalar
    factor: Any  # a scalar or None
    token_weight: Any  # (N,) or None
    dlse: Any  # (N,) or None
    dentropy: Any  # (N,) or None


class OnePassUpstream(NamedTuple):
    """The factors of rows' losses and of `z_loss * lse^2`; or the strides of these tensors."""

    dloss: Any  # (N,) or a scalar
    factor: Any  # a scalar or None
    token_weight: Any  # (N,) or None
    dz: Any  # (N,) or a scalar or None


class Gradients(NamedTuple):
    """Where gradients are written."""

    dx: Any  # (B, T, V), may be x itself; or None
    dprobs: Any  # (B, T, V) or None


class Strides(NamedTuple):
    """The strides of a tensor (B, T, V)."""

    b: Any
    t: Any
    v: Any


class ForwardStrides(NamedTuple):
    """The strides of what forward reads."""

    x: Strides
    probs: Strides


class BackwardStrides(NamedTuple):
    """The strides of what backward reads and writes; 0 for tensors that are None."""

    x: Strides
    probs: Strides
    dx: Strides
    dprobs: Strides
    upstream: Upstream


class OnePassStrides(NamedTuple):
    """The strides of what the one pass reads and writes."""

    x: Strides
    dx: Strides
    upstream: OnePassUpstream


class Product(NamedTuple):
    """A product and its factors."""

    x: Any  # (B, T, V)
    out: Any  # (B, T, V), may be x itself
    dloss: Any  # a scalar
    factor: Any  # a scalar or None


class ProductStrides(NamedTuple):
    """The strides of a product and of its result."""

    x: Strides
    out: Strides


class Shares(NamedTuple):
    """What gives each row its share of a mean."""

    target: Any  # (N,) int64
    weight: Any  # (classes,) or None
    token_weight: Any  # (N,) or None
    normalizer: Any  # a scalar that takes the place of the sum of shares; or None


class Totals(NamedTuple):
    """The results of a reduction, each a scalar."""

    total: Any  # or None
    factor: Any  # of every row's gradient of the total
    num_tokens: Any  # int64, kept rows; or None


class ProgramSums(NamedTuple):
    """The sums of several programs that reduce rows."""

    partial: Any  # (2, programs): losses and shares
    count: Any  # (programs,) int64: kept rows


class Smoothing(NamedTuple):
    """Label smoothing."""

    confidence: Any  # 1 - smoothing, of the target
    share: Any  # smoothing / classes, of every class


class Curve(NamedTuple):
    """How logits are used, see `used_logits`."""

    scale: Any
    height: Any  # log2(e), times the cap if there is one
    steep: Any  # d used logit / d logit, without the slope of tanh
    coarse: Any  # a power of two that takes the place of the height in far rows, see `shift_of`
    nats: Any  # of a unit of exponents there


class LossOptions(NamedTuple):
    """The options of a loss, in the kernel's dtype of sums."""

    smoothing: Smoothing
    curve: Curve


class RowInputs(NamedTuple):
    """What a program reads of its rows."""

    x: Any  # pointers to the first logit of each row
    stride_xv: Any
    probs: Any  # pointers to the first probability of each row; or None
    stride_pv: Any
    weight: Any  # a pointer to the weight of the first class; or None
    keep: Any  # whether each row is kept
    v_end: Any  # the end of the classes that the program has


class RowOutputs(NamedTuple):
    """Where a program writes the gradients of its rows."""

    dx: Any  # pointers to the gradient of each row's first logit; or None
    stride_dxv: Any
    dprobs: Any  # pointers to the gradient of each row's first probability; or None
    stride_dpv: Any
    inside: Any  # whether each row exists


class LaneSums(NamedTuple):
    """The sums over the classes of each lane, see `sums`."""

    c: Any
    s: Any
    r: Any
    mass: Any
    d: Any
    best: Any  # the largest used logit
    at: Any  # the first class of the tile that has it


class RowSums(NamedTuple):
    """The sums over the classes of each row, see `sums`."""

    c: Any
    s: Any
    r: Any  # a quarter of it
    mass: Any
    d: Any
    largest: Any  # the largest used logit, without the cap
    predicted: Any  # the first class that has it
    far: Any  # whether that logit is far from zero, see `shift_of`


class TargetTerms(NamedTuple):
    """The numbers of a row for its target's logit: its gradient is `(e mass - q_s) g_s + e of_lse`, e = 2^(y - c)."""

    local: Any  # the target, counted from the first class of x
    q_s: Any  # its share of the target distribution, times s
    mass: Any
    g_s: Any  # the gradient of the loss over s
    of_lse: Any


class ExponentTerms(NamedTuple):
    """The numbers of a row for a gradient that comes from its exponents y - c, see `gradient_tile`."""

    multiplier: Any
    offset: Any


class Terms(NamedTuple):
    """The numbers of a row that its gradient is computed from."""

    c: Any
    height: Any  # of the curve in this row
    multiplier: Any  # of 2^(y - c)
    g: Any  # of q
    target: TargetTerms
    entropy: ExponentTerms
    probs: ExponentTerms


class GradientRows(NamedTuple):
    """All that the gradients of a program's rows are computed from, and where they go."""

    inputs: RowInputs
    outputs: RowOutputs
    terms: Terms
    options: LossOptions
