"""Chooses how kernels are launched: tiles, warps, splits and programs. Measured choices are data, in `tables.py`."""

from dataclasses import dataclass, replace

import triton

from .chip import Chip
from .structs import Held, Tile
from .tables import Program, fitting
from .variant import MAX_REGISTERS, ON_CHIP, ONE_PASS_PLAIN, OnChip, OnePass

#: Bytes of one memory access of a thread.
ACCESS = 16

#: Rows of at most this many bytes share programs, which then have SHORT_WARPS warps. A row has at most one warp.
SHORT_ROW = 4096
SHORT_WARPS = 4

#: Tile for logits whose classes are strided (images): rows are the contiguous dimension there, and 16 of them fill
#: the 32-byte sectors that DRAM is read in.
STRIDED_ROWS, STRIDED_CLASSES = 16, 32

#: The one-pass kernel's second read of a row hits the cache if all that is read and written since the first read fits
#: into it. That is at most this many times the bytes of the rows in flight.
REUSE = 3

#: Registers of a multiprocessor.
REGISTERS = 65536

#: Shared memory that the system takes of every program, and that a program needs to merge the sums of its warps.
RESERVED, SCRATCH = 1024, 512

#: Rows per program of the kernel that merges splits, and the most rows whose splits the reduction merges itself.
MERGE_ROWS, MERGE_AND_REDUCE_ROWS = 128, 1024

#: The reduction: the rows that a program reads at a time, the threads per program, the number of rows up to which a
#: single program reduces them all (it then reads sixteen times), and the most programs that share more rows.
REDUCE_BLOCK, REDUCE_THREADS, REDUCE_ROWS, REDUCE_PROGRAMS = 4096, 1024, 65536, 256


def ceil_div(a: int, b: int) -> int:
    """Triton's own `cdiv` takes microseconds on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class Launch:
    """One kernel configuration: a tile, and `split_tiles` tiles for each of `splits` programs of a row."""

    BLOCK_N: int
    CHUNKS: int
    LANES: int
    WIDTH: int
    num_warps: int
    splits: int = 1
    split_tiles: int = 0
    programs: int = 0  # of the one-pass and scale kernels, whose programs loop over rows
    piece: Tile | None = None  # of a row that stays on the chip
    held: Held | None = None
    registers: int = 0  # of a thread, where a row stays on the chip

    @property
    def TILE(self) -> Tile:
        return Tile(self.BLOCK_N, self.CHUNKS, self.LANES, self.WIDTH, self.BLOCK_V)

    @property
    def BLOCK_V(self) -> int:
        return self.CHUNKS * self.LANES * self.WIDTH


def _tile(T: int, V: int, itemsize: int, contiguous: bool, aligned: bool, program: Program, chip: Chip) -> Launch:
    """The tile for rows of `V` classes, `T` of which are evenly spaced: several short or strided rows, or else one."""
    if not contiguous:
        classes = min(STRIDED_CLASSES, triton.next_power_of_2(max(V, 1)))
        return Launch(STRIDED_ROWS if T >= STRIDED_ROWS else 1, 1, classes, 1, SHORT_WARPS)
    WIDTH = ACCESS // itemsize if aligned else 1
    if V * itemsize <= SHORT_ROW:
        threads = SHORT_WARPS * chip.warp_size
        LANES = min(chip.warp_size, triton.next_power_of_2(ceil_div(max(V, 1), WIDTH)))
        BLOCK_N = threads // LANES
        if T >= BLOCK_N:
            return Launch(BLOCK_N, 1, LANES, WIDTH, SHORT_WARPS)
    LANES = program.num_warps * chip.warp_size
    CHUNKS = program.thread_logits // WIDTH
    while CHUNKS > 1 and CHUNKS * LANES * WIDTH >= 2 * V:
        CHUNKS //= 2
    return Launch(1, CHUNKS, LANES, WIDTH, program.num_warps)


def _split(launch: Launch, V: int, splits: int) -> Launch:
    """The launch with each row split into at most `splits` parts of whole tiles."""
    tiles = ceil_div(max(V, 1), launch.BLOCK_V)
    split_tiles = ceil_div(tiles, max(1, min(splits, tiles)))
    return replace(launch, splits=ceil_div(tiles, split_tiles), split_tiles=split_tiles)


def _splits_to_fill(chip: Chip, program: Program, B: int, T: int, launch: Launch) -> int:
    """The parts per row that give every multiprocessor its programs; 0 or 1 if rows need not be split."""
    return chip.multiprocessors * program.programs // max(B * ceil_div(T, launch.BLOCK_N), 1)


def part_launch(T: int, V: int, itemsize: int, contiguous: bool, aligned: bool, chip: Chip) -> Launch:
    """The forward launch for a block of the vocabulary, which is not split again."""
    return _split(_tile(T, V, itemsize, contiguous, aligned, fitting(chip.table.forward, V * itemsize), chip), V, 1)


def forward_launch(B: int, T: int, V: int, itemsize: int, contiguous: bool, aligned: bool, chip: Chip) -> Launch:
    """The forward launch: when rows are few and long, their vocabulary is split until the programs fill the chip."""
    launch = part_launch(T, V, itemsize, contiguous, aligned, chip)
    if V * itemsize <= SHORT_ROW:
        return launch
    return _split(launch, V, _splits_to_fill(chip, fitting(chip.table.forward, V * itemsize), B, T, launch))


def backward_launch(B: int, T: int, V: int, itemsize: int, contiguous: bool, aligned: bool, chip: Chip) -> Launch:
    """The backward launch: a program has several tiles, and fewer where rows are few."""
    program = fitting(chip.table.backward, V * itemsize)
    launch = _tile(T, V, itemsize, contiguous, aligned, program, chip)
    tiles = ceil_div(max(V, 1), launch.BLOCK_V)
    return _split(launch, V, max(_splits_to_fill(chip, program, B, T, launch), ceil_div(tiles, program.tiles or tiles)))


def one_pass_program(V: int, itemsize: int, variant: OnePass, chip: Chip) -> Program:
    """The program of the chip's table, or else one whose rows in flight fit into the cache."""
    if chip.table.one_pass and variant is ONE_PASS_PLAIN:
        return fitting(chip.table.one_pass, V * itemsize)
    cached = chip.l2_bytes // max(1, REUSE * V * itemsize * chip.multiprocessors)
    programs = 1 << min(3, max(1, cached).bit_length() - 1)
    return Program(variant.threads // programs // chip.warp_size, variant.thread_logits, programs=programs)


def one_pass_launch(N: int, V: int, itemsize: int, aligned: bool, variant: OnePass, chip: Chip) -> Launch:
    """The one-pass launch: a program has one row at a time."""
    program = one_pass_program(V, itemsize, variant, chip)
    launch = _split(_tile(0, V, itemsize, True, aligned, program, chip), V, 1)
    return replace(launch, programs=max(1, min(N, chip.multiprocessors * program.programs)))


def on_chip_launch(N: int, V: int, itemsize: int, aligned: bool, variants: tuple[OnChip, OnChip], chip: Chip) -> Launch:
    """The launch of the one pass that keeps its row on the chip."""
    for_whole, for_others = variants
    aligned = aligned and V * itemsize % ACCESS == 0
    featured = variants is not ON_CHIP["plain"]
    if aligned and chip.table.on_chip and not featured:
        return _on_chip_launch(N, V, itemsize, aligned, _tuned(fitting(chip.table.on_chip, V * itemsize), chip), chip)
    has_tail = not aligned or (featured and V % 16 != 0)  # Triton specializes on V % 16 == 0
    variant = for_others if has_tail else for_whole
    launch = _on_chip_launch(N, V, itemsize, aligned, variant, chip)
    if launch.held.HAS_REST and not has_tail:
        variant, launch = for_others, _on_chip_launch(N, V, itemsize, aligned, for_others, chip)
    if featured and launch.num_warps == 1:  # the compiler unrolls the loop over so few pieces, which takes registers
        return _on_chip_launch(N, V, itemsize, aligned, variant._replace(chunks=1, kept=1), chip)
    return launch


def _tuned(program: Program, chip: Chip) -> OnChip:
    """The variant of a table's program, whose threads have all registers of a multiprocessor."""
    chunks = program.thread_logits // 8  # accesses of logits of 16 bits
    registers = min(MAX_REGISTERS, REGISTERS // (program.num_warps * chip.warp_size))
    return OnChip(program.num_warps, registers, chunks, chunks * program.tiles)


def _on_chip_launch(N: int, V: int, itemsize: int, aligned: bool, variant: OnChip, chip: Chip) -> Launch:
    """The launch with as many programs a multiprocessor as can keep their rows, or else with one."""
    WIDTH = ACCESS // itemsize
    programs = variant.warps
    while True:
        LANES = variant.warps // programs * chip.warp_size
        # A piece has as many accesses as registers keep, so that what whole pieces leave of a row fits into these.
        piece = Tile(1, variant.kept, LANES, WIDTH, variant.kept * LANES * WIDTH)
        room = max(0, chip.shared_bytes // programs - RESERVED - SCRATCH) // (piece.BLOCK_V * itemsize)
        missing = ceil_div(max(0, V // WIDTH * WIDTH - piece.BLOCK_V), piece.BLOCK_V)
        if missing <= room or programs == 1:
            break
        programs //= 2
    held = Held(min(room, missing), missing > room, not aligned)
    return Launch(
        1, variant.chunks, LANES, WIDTH, variant.warps // programs, piece=piece, held=held,
        programs=max(1, min(N, chip.multiprocessors * programs)), registers=variant.registers,
    )  # fmt: skip


def distillation_launch(
    N: int, V: int, itemsize: int, teacher_itemsize: int, aligned: bool, again: bool, variant: OnePass, chip: Chip
) -> Launch:
    """The launch of a distillation's rows, of which a program has one at a time.

    If they are walked `again`, only as many programs are launched as leave their rows of both sides in the cache.
    """
    program = Program(4, variant.thread_logits)
    if again:
        program = one_pass_program(V, itemsize + teacher_itemsize, variant, chip)
    launch = _split(_tile(0, V, max(itemsize, teacher_itemsize), True, aligned, program, chip), V, 1)
    return replace(launch, programs=max(1, min(N, chip.multiprocessors * program.programs)) if again else N)


def scale_launch(T: int, V: int, itemsize: int, contiguous: bool, aligned: bool, chip: Chip) -> Launch:
    launch = _tile(T, V, itemsize, contiguous, aligned, Program(8), chip)
    return replace(launch, programs=chip.multiprocessors * chip.threads // (launch.num_warps * chip.warp_size))
