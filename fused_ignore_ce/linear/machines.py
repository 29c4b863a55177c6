"""The rates of machines by which plans are predicted."""

from __future__ import annotations

import math
from typing import NamedTuple


class Machine(NamedTuple):
    """The rates of a machine that predictions assume."""

    flops: float  #: of a large GEMM, per second
    bandwidth: float  #: bytes per second, of the passes over the weight and its gradient that every chunk makes
    touch: float  #: bytes per second, of memory used for the first time
    elements: float  #: logits per second that the loss's kernels get through, in one direction
    tile: float  #: seconds per tile, for everything that does not depend on its size


#: The rates, by device type and bytes of an operand's element.
#: CPU: fitted to measurements on a 2-core EPYC with AVX-512 and bfloat16 instructions, of all three plans with tiles
#: of 16 to 2048 rows and 128 to 8192 classes at V=32768, D=64 to 1024. Relative to "one block", what was predicted
#: for chunks of 128 rows and more was within 0.2 of what was measured, for blocks of 512 classes and more within 0.35;
#: smaller tiles were up to 3.6 times slower than large ones, as is predicted. CUDA: not measured, but from data
#: sheets (H100 SXM: 989 TFLOP/s dense in half precision, of which GEMMs reach about 70%, 67 in float32; 3.35 TB/s);
#: it is mostly the ratio of flops to bandwidth that matters, and that is similar from A100 to B200.
MACHINES = {
    ("cpu", 2): Machine(390e9, 12e9, 2.5e9, 1.2e9, 5e-4),
    ("cpu", 4): Machine(175e9, 12e9, 2.5e9, 1.2e9, 5e-4),
    ("cpu", 8): Machine(80e9, 12e9, 2.5e9, 0.6e9, 5e-4),
    ("cuda", 2): Machine(700e12, 2.8e12, math.inf, 900e9, 5e-5),
    ("cuda", 4): Machine(50e12, 2.8e12, math.inf, 450e9, 5e-5),
    ("cuda", 8): Machine(50e12, 2.8e12, math.inf, 225e9, 5e-5),
}
