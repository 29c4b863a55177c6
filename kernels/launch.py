"""How the kernels are launched: tile shapes, warps and splits, as data.

No entry was tuned on hardware yet. They follow from arithmetic: with 32 bytes of logits a thread, two 16-byte loads
are in flight, and a multiprocessor's 2048 threads have 64 KB in flight where about 40 KB hide the latency of HBM3.
More would spill with all features on (`python -m bench.aot`).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

#: Bytes of a row that one program handles at a time, at most: (largest V, bytes, num_warps).
BLOCKS = (
    (1024, 2048, 4),
    (4096, 4096, 4),
    (None, 8192, 8),
)

#: A tile of several rows: elements, and rows, at most. Each row costs registers of its own.
SEVERAL_ROWS, MOST_ROWS = 512, 16

#: The least BLOCK_V: smaller tiles would be further kernels to compile, for nothing.
LEAST_BLOCK = 16

#: Tile for logits whose classes are strided (images): rows are the contiguous dimension there, and 16 of them fill
#: the 32-byte sectors that DRAM is read in.
STRIDED_ROWS, STRIDED_CLASSES = 16, 32

#: A grid of fewer programs than this many per multiprocessor leaves the chip idle: split the rows.
PROGRAMS_PER_MULTIPROCESSOR = 4

#: Registers a thread, at most: as many as there are. Left to itself, ptxas spills a word or two of some variants to
#: reach the next step of occupancy; told this, it spills none on any architecture.
MAX_REGISTERS = 255

#: Rows per program of the kernel that merges the splits.
MERGE_ROWS = 128


@dataclass(frozen=True)
class Chip:
    """What a launch depends on."""

    arch: int
    multiprocessors: int


#: The interpreter runs what this chip would run.
INTERPRETED = Chip(arch=90, multiprocessors=132)


@dataclass(frozen=True)
class Launch:
    """One kernel configuration. `split_v` classes go to each of `splits` programs per row."""

    BLOCK_N: int
    BLOCK_V: int
    num_warps: int
    splits: int = 1
    split_v: int = 0


@lru_cache
def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.major * 10 + properties.minor, properties.multi_processor_count)


def tile(T: int, V: int, itemsize: int, contiguous: bool) -> Launch:
    """The tile for rows of `V` classes, `T` of which are evenly spaced: as many rows as fit, or one."""
    classes = max(LEAST_BLOCK, triton.next_power_of_2(max(V, 1)))
    if contiguous:
        most, num_warps = next((size // itemsize, w) for limit, size, w in BLOCKS if limit is None or V <= limit)
        BLOCK_V = min(classes, most)
        BLOCK_N = min(MOST_ROWS, max(1, SEVERAL_ROWS // BLOCK_V))
    else:
        BLOCK_V, BLOCK_N, num_warps = min(classes, STRIDED_CLASSES), STRIDED_ROWS, 4
    return Launch(BLOCK_N if T >= BLOCK_N else 1, BLOCK_V, num_warps)


def unsplit(launch: Launch, V: int) -> Launch:
    """The tile, with whole rows to a program."""
    return replace(launch, splits=1, split_v=triton.cdiv(max(V, 1), launch.BLOCK_V) * launch.BLOCK_V)


def forward_launch(B: int, T: int, V: int, itemsize: int, contiguous: bool, chip: Chip) -> Launch:
    """A tile, and as many splits of the vocabulary as fill the chip when rows are few."""
    launch = tile(T, V, itemsize, contiguous)
    programs = B * triton.cdiv(T, launch.BLOCK_N)
    wanted = chip.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    blocks = triton.cdiv(max(V, 1), launch.BLOCK_V)
    splits = min(blocks, max(1, wanted // max(programs, 1)))
    split_blocks = triton.cdiv(blocks, splits)
    return replace(launch, splits=triton.cdiv(blocks, split_blocks), split_v=split_blocks * launch.BLOCK_V)
