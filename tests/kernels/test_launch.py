"""What the launchers choose: tiles cover the vocabulary once, on every chip, and rows in flight fit into its cache."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.kernels import arguments, launch, prepare, tables
from fused_ignore_ce.kernels import chip as chips
from fused_ignore_ce.kernels.chip import INTERPRETED, Chip
from fused_ignore_ce.kernels.tables import Program, Table
from fused_ignore_ce.kernels.variant import (
    ON_CHIP,
    ONE_PASS_GENERAL,
    ONE_PASS_PLAIN,
    ONE_PASS_SIMPLE,
    one_pass_registers,
)

A100 = Chip(80, 108, 40 << 20, 2048, 32)
MI300 = Chip("gfx942", 304, 4 << 20, 2048, 64)
CHIPS = [INTERPRETED, A100, MI300]


def test_few_rows_are_split_and_many_are_not():
    assert launch.forward_launch(1, 4, 128256, 2, True, True, INTERPRETED).splits > 8
    assert launch.forward_launch(1, 8192, 128256, 2, True, True, INTERPRETED).splits == 1
    assert launch.forward_launch(1, 4, 300, 2, True, True, INTERPRETED).splits == 1
    assert launch.forward_launch(1, 4, 128256, 2, True, True, Chip(90, 1)).splits == 1


def test_backward_programs_have_several_tiles_and_fewer_where_rows_are_few():
    many = launch.backward_launch(1, 8192, 128256, 2, True, True, INTERPRETED)
    few = launch.backward_launch(1, 4, 128256, 2, True, True, INTERPRETED)
    assert many.split_tiles == 4
    assert few.split_tiles == 1


@pytest.mark.parametrize("V", [0, 1, 2, 31, 1024, 1025, 32000, 50257, 128256, 262144, 2**31 - 1])
@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (3, 5), (1, 8192), (2**20, 1)])
def test_splits_cover_the_vocabulary_once(rows, V):
    for contiguous, aligned, itemsize, chip in product((True, False), (True, False), (2, 4, 8), CHIPS):
        for choose in (launch.forward_launch, launch.backward_launch):
            chosen = choose(*rows, V, itemsize, contiguous, aligned, chip)
            split = chosen.split_tiles * chosen.BLOCK_V
            assert chosen.splits * split >= V > (chosen.splits - 1) * split or V == 0
            assert all(size & (size - 1) == 0 for size in chosen.TILE)
            assert 1 <= chosen.num_warps * chip.warp_size <= 1024


@pytest.mark.parametrize("chip", CHIPS, ids=["H100", "A100", "MI300X"])
@pytest.mark.parametrize("V", [1, 1000, 32000, 50257, 65536, 128256])
def test_long_rows_give_every_thread_a_lane(V, chip):
    """A tile has as many lanes as its program has threads, so that sums in the loop stay within a thread."""
    for aligned, itemsize in product((True, False), (2, 4)):
        for chosen in (
            launch.forward_launch(1, 8192, V, itemsize, True, aligned, chip),
            launch.backward_launch(1, 8192, V, itemsize, True, aligned, chip),
            launch.one_pass_launch(8192, V, itemsize, aligned, ONE_PASS_PLAIN, chip),
        ):
            assert chosen.BLOCK_N * chosen.LANES == chosen.num_warps * chip.warp_size
            assert chosen.WIDTH * itemsize == (16 if aligned else itemsize)


@pytest.mark.parametrize("chip", [INTERPRETED, A100], ids=["H100", "A100"])
def test_rows_in_flight_fit_into_the_cache(chip):
    """So does all that is read and written between a row's two reads, where one row per multiprocessor fits."""
    for V in (1024, 8192, 32000, 60000):
        chosen = launch.one_pass_launch(2**20, V, 2, True, ONE_PASS_PLAIN, chip)
        assert chosen.programs * V * 2 * launch.REUSE <= chip.l2_bytes
    variants = ONE_PASS_PLAIN, ONE_PASS_SIMPLE, ONE_PASS_GENERAL
    for V, variant in product((1024, 32000, 262144), variants):
        chosen = launch.one_pass_launch(2**20, V, 2, True, variant, chip)
        assert chosen.programs // chip.multiprocessors * chosen.num_warps * chip.warp_size == variant.threads
        assert chosen.CHUNKS * chosen.WIDTH <= variant.thread_logits
        assert variant.threads * one_pass_registers(variant, variant.thread_logits) <= 65536
    assert launch.one_pass_launch(5, 32000, 2, True, variants[0], chip).programs == 5


KEEPING = {
    arch: Chip(arch, 132, shared_bytes=shared << 10) for arch, shared in ((80, 164), (86, 100), (90, 228), (100, 228))
}


@pytest.mark.parametrize("arch", KEEPING)
def test_a_row_on_the_chip_fits_and_is_covered(arch):
    """Shared memory and registers have room for all programs, and what registers keep is enough for the rest."""
    chip, sizes = KEEPING[arch], [*range(1, 300), *range(3000, 300000, 1777), 2**31 - 8]
    for itemsize, aligned, pair in product((2, 4), (True, False), ON_CHIP.values()):
        for V in sizes:
            chosen = launch.on_chip_launch(10**6, V, itemsize, aligned, pair, chip)
            featured = pair is not ON_CHIP["plain"]
            variant = pair[chosen.held.HAS_REST or chosen.held.HAS_EDGES or (featured and V % 16 != 0)]
            if featured and launch._on_chip_launch(1, V, itemsize, aligned, variant, chip).num_warps == 1:
                variant = variant._replace(chunks=1, kept=1)
            assert (chosen.CHUNKS, chosen.piece.CHUNKS, chosen.registers) == (
                variant.chunks, variant.kept, variant.registers,
            )  # fmt: skip
            resident = chosen.programs // chip.multiprocessors
            piece = chosen.piece.BLOCK_V * itemsize
            used = chosen.held.PIECES * piece + launch.RESERVED + launch.SCRATCH
            assert resident * used <= max(chip.shared_bytes, resident * (launch.RESERVED + launch.SCRATCH))
            assert resident * chosen.num_warps == variant.warps
            assert variant.warps * chip.warp_size * variant.registers <= 65536
            for head in range(chosen.WIDTH if chosen.held.HAS_EDGES else 1):
                body = max(V - head, 0) // chosen.WIDTH * chosen.WIDTH
                left = body - chosen.held.PIECES * chosen.piece.BLOCK_V
                assert left >= 0
                assert chosen.held.HAS_REST or left <= chosen.piece.BLOCK_V
                assert not chosen.held.HAS_REST or left >= chosen.piece.BLOCK_V
            assert chosen.held.HAS_EDGES or V % chosen.WIDTH == 0
            if V * itemsize <= (65536 if arch != 86 else 49152):
                assert resident >= 2


@pytest.mark.parametrize(
    ("arch", "itemsize", "kept"), [(80, 2, 98304), (80, 4, 49152), (90, 2, 131072), (90, 4, 65536), (100, 2, 131072)]
)
def test_logits_that_the_chip_keeps(arch, itemsize, kept):
    """The plain kernel reads rows of so many logits once, and of longer ones only what is left."""
    for V, again in ((kept, False), (kept + 16, True)):
        chosen = launch.on_chip_launch(8192, V, itemsize, True, ON_CHIP["plain"], KEEPING[arch])
        assert chosen.held.HAS_REST == again
        assert (chosen.held.PIECES + 1) * chosen.piece.BLOCK_V == kept


def test_where_rows_stay_on_the_chip():
    """Elsewhere, the one pass reads them again from the L2 cache."""

    def kernel(x, dx, chip):
        strides = (0, 0, 0, 0)
        found = prepare.one_pass(
            arguments.form_of(x), arguments.form_of(dx), None, strides, LossOptions(), False, None, chip
        )
        return found.kernel

    x = torch.empty(4, 1001, dtype=torch.bfloat16)
    chip = KEEPING[90]
    assert prepare.stays_on_chip(*map(arguments.Form.of, map(arguments.form_of, (x, x))), chip)
    assert kernel(x, x, chip) is prepare.on_chip_kernel
    assert kernel(x, x, INTERPRETED) is prepare.one_pass_kernel
    assert kernel(x, x, replace(MI300, shared_bytes=0)) is prepare.one_pass_kernel
    assert kernel(x.double(), x.double(), chip) is prepare.one_pass_kernel
    aligned = torch.empty(4, 1008, dtype=torch.bfloat16)[:, :1001]
    assert kernel(x, aligned, chip) is prepare.one_pass_kernel


def test_a_measured_table_goes_before_arithmetic():
    table = Table(
        forward=((1000, Program(2)), (None, Program(8, thread_logits=8))),
        backward=((None, Program(4, tiles=2)),),
        one_pass=((None, Program(16, programs=2)),),
        reason="a test",
    )
    chip = replace(INTERPRETED, table=table)
    forward = launch.forward_launch(1, 8192, 32000, 2, True, True, chip)
    backward = launch.backward_launch(1, 8192, 32000, 2, True, True, chip)
    one_pass = launch.one_pass_launch(8192, 32000, 2, True, ONE_PASS_PLAIN, chip)
    assert (forward.num_warps, forward.CHUNKS) == (8, 1)
    assert (backward.num_warps, backward.split_tiles) == (4, 2)
    assert (one_pass.num_warps, one_pass.programs) == (16, 264)
    assert chip.table.one_pass
    for variant in (ONE_PASS_SIMPLE, ONE_PASS_GENERAL):
        arithmetic = launch.one_pass_launch(8192, 32000, 2, True, variant, INTERPRETED)
        assert launch.one_pass_launch(8192, 32000, 2, True, variant, chip) == arithmetic


def test_programs_of_a_table_say_when_rows_are_split():
    for programs in (1, 4):
        ladder = ((None, Program(8, programs=programs)),)
        chip = replace(INTERPRETED, table=Table(ladder, ladder, (), "a test"))
        assert launch.forward_launch(1, 132, 128256, 2, True, True, chip).splits == programs
        assert launch.backward_launch(1, 132, 128256, 2, True, True, chip).splits == programs


STEP: dict[str, Any] = {
    "row_bytes": None,
    "num_warps": 8,
    "thread_logits": 16,
    "tiles": 4,
    "programs": 4,
    "measured": [],
}


def written(tmp_path, **changes):
    entry = {
        "forward": [STEP],
        "backward": [STEP],
        "one_pass": [],
        "on_chip": [],
        "reason": "a test",
        "arch": 90,
    } | changes
    (tmp_path / "tables.json").write_text(json.dumps({"Device": entry}))
    return tmp_path / "tables.json"


def test_a_table_is_read(tmp_path):
    steps = [STEP | {"row_bytes": 4096, "num_warps": 4}, STEP]
    table = tables.read(written(tmp_path, backward=steps))["Device"]
    assert table.forward == ((None, Program(8, 16, 4, 4)),)
    assert table.backward == ((4096, Program(4, 16, 4, 4)), (None, Program(8, 16, 4, 4)))
    assert (table.one_pass, table.reason, table.arch) == ((), "a test", 90)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other": 1}, "expected forward, backward, one_pass, on_chip, reason and arch"),
        ({"forward": []}, "forward has no step"),
        ({"forward": [STEP | {"num_warps": 16}]}, "num_warps=16"),
        ({"forward": [STEP | {"thread_logits": 4}]}, "thread_logits=4"),
        ({"one_pass": [STEP | {"num_warps": 32, "thread_logits": 32}]}, "too few registers"),
        ({"on_chip": [STEP | {"num_warps": 16, "tiles": 3}]}, "tiles=3"),
        ({"forward": [STEP | {"programs": 0}]}, "programs=0"),
        ({"forward": [STEP | {"waves": 1}]}, "waves"),
        ({"forward": [STEP | {"row_bytes": 4096}]}, "row_bytes"),
        ({"forward": [STEP | {"row_bytes": 8}, STEP | {"row_bytes": 4}, STEP]}, "row_bytes"),
        ({"forward": [STEP, STEP]}, "row_bytes"),
    ],
    ids=["key", "empty", "warps", "logits", "registers", "tiles", "programs", "field", "no-last", "order", "two-last"],
)
def test_a_table_that_is_wrong_says_where(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        tables.read(written(tmp_path, **changes))
    assert "'Device'" in str(caught.value)
    assert "python -m bench.tune" in str(caught.value)


@pytest.mark.parametrize("device", ["Device", "Another"])
def test_a_device_gets_its_own_table(monkeypatch, tmp_path, device):
    """The properties that PyTorch reports for the device are made up."""
    table = tables.read(written(tmp_path))["Device"]
    monkeypatch.setitem(chips.TABLES, "Device", table)
    properties = SimpleNamespace(
        name=device, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20,
        max_threads_per_multi_processor=2048, warp_size=32, shared_memory_per_multiprocessor=228 << 10,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    chip = chips.chip_of.__wrapped__(torch.device("cuda", 0))
    assert chip == replace(KEEPING[90], table=table if device == "Device" else tables.ARITHMETIC)


@pytest.mark.parametrize(("chip", "known"), [(INTERPRETED, True), (MI300, False)], ids=["NVIDIA", "AMD"])
def test_launch_options_are_the_chips(chip, known):
    """A limit on registers is an option of NVIDIA's compiler. AMD's refuses unknown options."""
    assert ("maxnreg" in chip.options(40)) == known


def test_rows_are_accessed_as_their_alignment_allows():
    """16 bytes at a time only where every row of every tensor starts at a multiple of them."""
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16)

    def form_of(tensor):
        return arguments.Form.of(arguments.form_of(tensor))

    def aligned(*tensors):
        return arguments.aligned(*map(form_of, tensors))

    assert aligned(None, x, None, x)
    assert aligned(x[..., 8:])
    assert not aligned(x[..., 1:])
    assert not aligned(x, torch.empty(2, 3, 63, dtype=torch.bfloat16))
    assert not aligned(x[0, 0, 1:], x)
    assert aligned(x, x[..., :1].expand(2, 3, 64))  # each access is one element
    assert not form_of(x.transpose(1, 2).contiguous().transpose(1, 2)).contiguous
