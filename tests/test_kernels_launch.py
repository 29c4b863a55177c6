"""What the launchers choose: tiles cover the vocabulary once, on every chip, and rows in flight fit into its cache."""

from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fused_ignore_ce.kernels import arguments, launch
from fused_ignore_ce.kernels.launch import INTERPRETED, Chip, Program, Table

A100 = Chip(80, 108, 40 << 20, 2048, 32, "A100")
MI300 = Chip("gfx942", 304, 4 << 20, 2048, 64, "MI300X")
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


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("V", [1, 1000, 32000, 50257, 65536, 128256])
def test_long_rows_give_every_thread_a_lane(V, chip):
    """The lanes of a tile are the threads of its program: no sum in the loop leaves a thread."""
    for aligned, itemsize in product((True, False), (2, 4)):
        for chosen in (
            launch.forward_launch(1, 8192, V, itemsize, True, aligned, chip),
            launch.backward_launch(1, 8192, V, itemsize, True, aligned, chip),
            launch.one_pass_launch(8192, V, itemsize, aligned, True, chip),
        ):
            assert chosen.BLOCK_N * chosen.LANES == chosen.num_warps * chip.warp_size
            assert chosen.WIDTH * itemsize == (16 if aligned else itemsize)


@pytest.mark.parametrize("chip", [INTERPRETED, A100], ids=["H100", "A100"])
def test_rows_in_flight_fit_into_the_cache(chip):
    """With what is read and written between the two reads, wherever one row a multiprocessor does."""
    for V in (1024, 8192, 32000, 60000):
        chosen = launch.one_pass_launch(2**20, V, 2, True, True, chip)
        assert chosen.programs * V * 2 * launch.REUSE <= chip.l2_bytes
    for V, simple in product((1024, 32000, 262144), (True, False)):
        chosen = launch.one_pass_launch(2**20, V, 2, True, simple, chip)
        threads, registers = launch.ONE_PASS_SIMPLE if simple else launch.ONE_PASS_GENERAL
        assert chosen.programs // chip.multiprocessors * chosen.num_warps * chip.warp_size == threads
        assert threads * registers <= 65536
    assert launch.one_pass_launch(5, 32000, 2, True, True, chip).programs == 5


def test_a_measured_table_goes_before_arithmetic():
    table = Table(
        forward=((1000, Program(2)), (None, Program(16, thread_logits=8))),
        backward=((None, Program(4, tiles=2)),),
        one_pass=((None, Program(16, programs=2)),),
        reason="a test",
    )
    chip = replace(INTERPRETED, name="Tuned")
    with mock.patch.dict(launch.TABLES, {"Tuned": table}):
        forward = launch.forward_launch(1, 8192, 32000, 2, True, True, chip)
        backward = launch.backward_launch(1, 8192, 32000, 2, True, True, chip)
        one_pass = launch.one_pass_launch(8192, 32000, 2, True, True, chip)
    assert (forward.num_warps, forward.CHUNKS) == (16, 1)
    assert (backward.num_warps, backward.split_tiles) == (4, 2)
    assert (one_pass.num_warps, one_pass.programs) == (16, 264)


@pytest.mark.parametrize(("chip", "known"), [(INTERPRETED, True), (MI300, False)], ids=["NVIDIA", "AMD"])
def test_launch_options_are_the_chips(chip, known):
    """A limit of registers is an option of NVIDIA's compiler; the other refuses what it does not know."""
    assert ("maxnreg" in chip.options(40)) == known


def test_rows_are_accessed_as_their_alignment_allows():
    """16 bytes at a time only where every row of every tensor starts at a multiple of them."""
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16)
    assert arguments.layout(None, x, None, x) == (True, True)
    assert arguments.layout(None, x[..., 8:]) == (True, True)
    assert arguments.layout(None, x[..., 1:]) == (True, False)
    assert arguments.layout(None, x, torch.empty(2, 3, 63, dtype=torch.bfloat16)) == (True, False)
    assert arguments.layout(x[0, 0, 1:], x) == (True, False)
    assert arguments.layout(None, x.transpose(1, 2).contiguous().transpose(1, 2))[0] is False
    assert arguments.layout(None, x, x[..., :1].expand(2, 3, 64)) == (True, True)  # each access is one element
