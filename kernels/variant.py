"""The variants of kernels: how many registers a thread has, which follows from the features of a call."""

from typing import NamedTuple

from .structs import Options

#: Limits on registers per thread. 40 leave room for 1536 threads per multiprocessor, and no kernel with few features
#: spills with them. 64 leave room for 1024, where sums of parts are stored. Other kernels may use all that there are.
#: Without any limit, ptxas spills a word or two in some variants to reach the next step of occupancy; with this one, it
#: spills nothing on any architecture.
FEW_REGISTERS, PART_REGISTERS, MAX_REGISTERS = 40, 64, 255


def is_simple(launch, weight, probs, options: Options) -> bool:
    """Whether few registers suffice: one aligned row per program, no float64, no soft target read from tensors."""
    return launch.BLOCK_N == 1 and launch.WIDTH > 2 and probs is None and not (options.HAS_SOFT and weight is not None)


class OnePass(NamedTuple):
    """A variant of the one-pass kernel: threads per multiprocessor, and each thread's registers and logits at a time.

    The more features a kernel has, the fewer threads and logits it can have without spilling. The tail of a vocabulary
    that is not a multiple of 16 counts as a feature.
    """

    threads: int
    registers: int
    thread_logits: int


ONE_PASS_PLAIN, ONE_PASS_SIMPLE, ONE_PASS_GENERAL = OnePass(512, 128, 32), OnePass(1024, 64, 8), OnePass(512, 128, 8)

#: The distillation kernel, which sums over two distributions. Plain rows that are walked once take fewer registers, and
#: as many programs as fit are launched. Twice the logits fit into a thread if they have 16 bits.
#: Narrow accesses, of strided classes and of unaligned rows, take more addresses; AMD's compiler spills with features.
DISTILLED, DISTILLED_ONCE, DISTILLED_16_BITS = OnePass(512, 128, 8), OnePass(512, 96, 8), 16
DISTILLED_NARROW = OnePass(256, MAX_REGISTERS, 8)


def one_pass_variant(V: int, weight, is_float64: bool, options: Options) -> OnePass:
    tail = V % 16 != 0  # Triton specializes on V % 16 == 0
    if options.HAS_STATS or (options.HAS_SOFT and (weight is not None or tail)) or is_float64:
        return ONE_PASS_GENERAL
    return ONE_PASS_SIMPLE if any(options) or tail else ONE_PASS_PLAIN


def one_pass_registers(variant: OnePass, thread_logits: int) -> int:
    """Registers per thread for this many logits: the plain variant needs half as many with half of its logits."""
    return 64 if variant is ONE_PASS_PLAIN and thread_logits <= 16 else variant.registers


class OnChip(NamedTuple):
    """A variant of the one pass that keeps its row on the chip.

    A multiprocessor has `warps` of it, whose threads have `registers` each. A thread has `chunks` accesses of a tile at
    a time, and keeps `kept` accesses of a row in registers. Shared memory keeps as many tiles as it has room for.
    """

    warps: int
    registers: int
    chunks: int
    kept: int


#: By features: a variant for rows without a tail of which the chip keeps all, and one for others. "many" stands for
#: smoothing with class weights, a scale or a softcap: 255 registers, which a multiprocessor has for 8 warps.
ON_CHIP = {
    "plain": (OnChip(16, 128, 4, 4), OnChip(16, 128, 2, 4)),
    "one": (OnChip(16, 128, 2, 4), OnChip(16, 128, 1, 4)),
    "stats": (OnChip(16, 128, 2, 4), OnChip(16, 128, 2, 2)),
    "two": (OnChip(16, 128, 2, 2), OnChip(16, 128, 1, 2)),
    "many": (OnChip(16, 128, 1, 1), OnChip(8, 255, 1, 1)),
}


def on_chip_variants(weight, options: Options) -> tuple[OnChip, OnChip]:
    soft, capped, stats = options.HAS_SOFT, options.HAS_SOFTCAP, options.HAS_STATS
    if soft and (weight is not None or capped or options.HAS_SCALE):
        return ON_CHIP["many"]
    if stats and (soft or capped):
        return ON_CHIP["two"]
    if stats:
        return ON_CHIP["stats"]
    return ON_CHIP["one" if soft or capped else "plain"]


def distilled_variant(wide: bool, itemsize: int, again: bool, flags: tuple, is_nvidia: bool) -> OnePass:
    """`wide`: accesses are. `again`: rows are walked twice, for a gradient or a divergence that needs it."""
    student, teacher, mix = flags
    featured = any(student) or any(teacher) or mix.HARD or mix.APART or mix.KIND == "jsd"
    if not wide or (featured and not is_nvidia):
        return DISTILLED_NARROW
    if featured or itemsize > 4:
        return DISTILLED
    plain = DISTILLED if again else DISTILLED_ONCE
    return plain._replace(thread_logits=DISTILLED_16_BITS) if itemsize == 2 else plain
