"""Published times of other libraries' kernels, as data: what the model of `roof.py` is fitted to, and judged by.

Times are those of the libraries' authors, of GPUs that this project has not had. Liger's are of a whole call, forward
and backward, by CUDA events, with the host's work before the kernel and between its synchronisations.

Counts of the kernels are from machine code that Triton 3.7.1 made of releases on PyPI. Where the release is not the
published source, `Kernel.about` says what differs. Kernels that are not written in Triton, or whose source was not
published, have no counts. They are modelled as streams: by what they read and write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .chips import Chip, chip


class Stretch(NamedTuple):
    """Counts of a stretch of code, as `machine_code.Block` has them."""

    instructions: int
    special: int
    loaded: int
    stored: int
    in_flight: int
    masked: bool = True
    loaded_shared: int = 0


NOTHING = Stretch(0, 0, 0, 0, 0)


class Usage(NamedTuple):
    registers: int
    shared: int = 1024


@dataclass(frozen=True)
class Counts:
    """Counts of a kernel, as `machine_code.MachineCode` has them."""

    warps: int
    usage: Usage
    outside: Stretch
    loops: tuple[Stretch, ...]
    rounds: int = 2
    held: tuple[Stretch, ...] = ()
    pieces: Stretch = NOTHING


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel; by (architecture, bytes of a logit), what was counted in it. A kernel without counts is a stream."""

    name: str
    about: str
    counts: dict[tuple[int, int], Counts] = field(default_factory=dict)
    walks: int = 2  # over a row
    gradient: bool = True  # written over the logits
    threads: int = 2048  # on a multiprocessor, for a stream
    program: int = 1024  # threads, for a stream
    host: bool = True  # whether the time has the host's work and its synchronisations


def _liger(itemsize: int, warps: int, registers: int, outside: tuple[int, int, int], *loops: tuple[int, int]) -> Counts:
    """Liger's kernel, whose program reads 32768 logits at a time.

    `outside` has instructions, special functions and stores; a loop has instructions and bytes in flight. The first
    loop sums, the second writes the gradient.
    """
    logits = 32768 // (32 * warps)  # of a thread
    size = logits * itemsize
    (first, first_flight), (second, second_flight) = loops
    instructions, special, stores = outside
    return Counts(
        warps,
        Usage(registers),
        Stretch(instructions, special, 8 + itemsize, stores * itemsize, 8, masked=False),
        (
            Stretch(first, logits + 1, size, 0, first_flight),
            Stretch(second, logits + 2, size, size, second_flight),
        ),
    )


BEFORE = Kernel(
    "Liger, before its change at the target",
    "0.8.1, which is the published source",
    {
        (90, 2): _liger(2, 32, 50, (138, 2, 1), (309, 64), (634, 48)),
        (90, 4): _liger(4, 32, 64, (136, 2, 1), (289, 128), (604, 112)),
        (100, 2): _liger(2, 8, 127, (145, 2, 1), (1024, 224), (2605, 224)),
        (100, 4): _liger(4, 32, 62, (133, 2, 1), (258, 128), (618, 112)),
    },
)
MANY_WARPS = Kernel(
    "Liger, 32 warps",
    "0.8.1 with 32 warps, which is the published source",
    {(100, 2): _liger(2, 32, 55, (135, 2, 1), (299, 64), (689, 32))},
)
AFTER = Kernel(
    "Liger",
    "0.8.2, which computes the target's gradient anew where the published source corrects what it stored",
    {
        (90, 2): _liger(2, 32, 64, (141, 4, 2), (306, 64), (469, 64)),
        (90, 4): _liger(4, 32, 64, (139, 4, 2), (286, 128), (446, 128)),
        (100, 2): _liger(2, 8, 128, (151, 4, 2), (943, 224), (1657, 224)),
        (100, 4): _liger(4, 32, 64, (139, 4, 2), (255, 128), (456, 128)),
    },
)
LIGER_CUTE = Kernel("Liger's CuTe", "CuTe; a stream", program=512)
TRL_ENTROPY = Kernel("TRL, entropy", "source not published; a stream", walks=1, gradient=False, host=False)
QUACK = Kernel("QuACK, forward", "CuTe; a stream", walks=1, gradient=False, host=False)
QUACK_BACKWARD = Kernel("QuACK, backward", "CuTe; a stream", walks=1, host=False)


#: (chip, kernel, bytes of a logit, source)
Series = tuple[str, str, int, str]


@dataclass(frozen=True)
class Row:
    """A published time."""

    chip: Chip
    kernel: Kernel
    N: int
    V: int
    itemsize: int
    milliseconds: float
    source: str

    @property
    def series(self) -> Series:
        """What times have in common that were published together."""
        return self.chip.name, self.kernel.name, self.itemsize, self.source

    @property
    def is_shown(self) -> bool:
        return self.itemsize == 2 and (self.chip.name, self.kernel, self.N, self.V, self.source) in SHOWN


#: The times whose predictions documents show one by one: (chip, kernel, rows, classes, source), in 16 bits.
SHOWN = (
    ("H100", AFTER, 8192, 128256, "Liger-Kernel#1290"),
    ("H100", LIGER_CUTE, 8192, 128256, "Liger-Kernel#1290"),
    ("H100", BEFORE, 8192, 128256, "Liger-Kernel#1268"),
    ("H100", AFTER, 8192, 128256, "Liger-Kernel#1268"),
    ("B200", AFTER, 8192, 128256, "Liger-Kernel#1279"),
    ("B200", LIGER_CUTE, 8192, 128256, "Liger-Kernel#1279"),
    ("B200", AFTER, 8192, 32000, "Liger-Kernel#1279"),
    ("B200", LIGER_CUTE, 8192, 32000, "Liger-Kernel#1279"),
    ("B200", AFTER, 65536, 128256, "Liger-Kernel#1279"),
    ("B200", LIGER_CUTE, 65536, 128256, "Liger-Kernel#1279"),
    ("B200", MANY_WARPS, 8192, 128256, "Liger-Kernel#1267"),
    ("B200", BEFORE, 8192, 128256, "Liger-Kernel#1267"),
    ("H100", TRL_ENTROPY, 8192, 151936, "trl#7244"),
    ("H100", QUACK, 32768, 65536, "QuACK's README"),
    ("H100", QUACK_BACKWARD, 32768, 65536, "QuACK's README"),
)

#: The vocabularies at 8192 rows, and the numbers of rows at a vocabulary of 128256, of Liger's tables.
LIGER_V = (32000, 50304, 102400, 128256, 152064, 201088, 262144)
LIGER_N = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

#: Milliseconds in Liger's pull requests: by (chip, kernel, bytes of a logit, number), over vocabularies and over rows.
LIGER = {
    ("H100", BEFORE, 2, 1268): (
        (0.8484, 1.2223, 2.0434, 2.3179, 2.9131, 3.8283, 4.7663),
        (0.5599, 0.8055, 1.3031, 2.3162, 4.2325, 8.0368, 15.6748),
    ),
    ("H100", AFTER, 2, 1268): (
        (0.7890, 1.1375, 1.8907, 2.2790, 2.7976, 3.7046, 4.6687),
        (0.5552, 0.7913, 1.2690, 2.2734, 4.1427, 7.8853, 15.3520),
    ),
    ("H100", BEFORE, 4, 1268): (
        (1.0472, 1.5734, 3.7195, 4.5767, 5.3767, 7.0200, 9.0001),
        (0.8335, 1.3555, 2.4686, 4.5362, 8.6929, 17.0411, 33.7193),
    ),
    ("H100", AFTER, 4, 1268): (
        (1.0402, 1.6267, 3.7151, 4.5742, 5.3722, 7.0008, 9.0043),
        (0.8518, 1.3693, 2.4647, 4.5674, 8.7241, 17.0401, 33.6499),
    ),
    ("H100", AFTER, 2, 1290): (
        (0.7975, 1.1438, 1.8839, 2.2067, 2.7233, 3.6274, 4.6008),
        (0.5601, 0.7973, 1.2731, 2.2088, 4.0762, 7.8105, 15.2874),
    ),
    ("H100", LIGER_CUTE, 2, 1290): (
        (0.7215, 1.0494, 1.9960, 2.4283, 2.8312, 3.6500, 4.6563),
        (0.6004, 0.8644, 1.3858, 2.4278, 4.5233, 8.7104, 17.0571),
    ),
    ("B200", MANY_WARPS, 2, 1267): ((), (0.405, 0.583, 0.950, 1.686, 3.184, 6.092, 11.958)),
    ("B200", BEFORE, 2, 1267): ((), (0.391, 0.542, 0.839, 1.438, 2.694, 5.101, 9.924)),
    ("B200", BEFORE, 2, 1268): (
        (0.5179, 0.7967, 1.3693, 1.4240, 1.7677, 2.4596, 2.8544),
        (0.3744, 0.5264, 0.8250, 1.4229, 2.6574, 5.0804, 9.9058),
    ),
    ("B200", AFTER, 2, 1268): (
        (0.4455, 0.6663, 1.1129, 1.1802, 1.4415, 1.9703, 2.3144),
        (0.3356, 0.4595, 0.6987, 1.1787, 2.1671, 4.1005, 7.9347),
    ),
    ("B200", BEFORE, 4, 1268): (
        (0.6876, 1.0058, 1.7260, 1.8806, 2.3784, 3.2668, 4.0601),
        (0.4218, 0.6379, 1.0574, 1.8820, 3.5883, 6.8904, 13.6248),
    ),
    ("B200", AFTER, 4, 1268): (
        (0.6391, 0.9423, 1.6429, 1.8026, 2.2591, 3.1830, 3.9960),
        (0.4141, 0.6167, 1.0149, 1.8022, 3.4314, 6.5826, 13.0628),
    ),
    ("B200", AFTER, 2, 1279): (
        (0.4519, 0.6703, 1.1170, 1.1855, 1.4445, 1.9767, 2.3127),
        (0.3348, 0.4570, 0.7008, 1.1825, 2.1952, 4.1110, 7.9275),
    ),
    ("B200", LIGER_CUTE, 2, 1279): (
        (0.4024, 0.5616, 0.9643, 1.1595, 1.3336, 1.7063, 2.2164),
        (0.3364, 0.4554, 0.6902, 1.1565, 2.0945, 4.0096, 7.7274),
    ),
}


def rows() -> Iterator[Row]:
    for (name, kernel, itemsize, number), (over_v, over_n) in LIGER.items():
        shapes = [*((8192, V) for V in LIGER_V[: len(over_v)]), *((N, 128256) for N in LIGER_N)]
        # Of the two times of the shape that both tables have, the second.
        for (N, V), milliseconds in dict(zip(shapes, (*over_v, *over_n), strict=True)).items():
            yield Row(chip(name), kernel, N, V, itemsize, milliseconds, f"Liger-Kernel#{number}")
    yield Row(chip("H100"), TRL_ENTROPY, 8192, 151936, 2, 0.89, "trl#7244")
    for V in (16384, 65536, 262144):  # its chart shows 3.0 to 3.2 TB/s
        for kernel, units in ((QUACK, 1), (QUACK_BACKWARD, 2)):
            yield Row(chip("H100"), kernel, 32768, V, 2, 1e3 * 32768 * V * 2 * units / 3.1e12, "QuACK's README")
