"""The kernels move no more bytes than the loss needs, and the meter notices kernels that do."""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from bench.proofs.meter import Traffic
from bench.proofs.traffic import Case, measure
from fused_ignore_ce.core.options import LossOptions
from fused_ignore_ce.core.rows import Block

pytestmark = pytest.mark.usefixtures("triton_kernels")

CASES = [
    pytest.param(Case(16, 1003, torch.bfloat16), id="one-block-bf16"),
    pytest.param(Case(8, 9001, torch.bfloat16), id="several-blocks-bf16"),  # V is no multiple of the block
    pytest.param(Case(8, 9001, torch.float32), id="several-blocks-fp32"),
    pytest.param(Case(64, 257, torch.float32), id="several-rows-a-tile"),
    pytest.param(Case(64, 300, torch.float32, strided=True), id="strided"),
    pytest.param(Case(4, 20000, torch.float16, busy=False), id="split"),
    pytest.param(Case(8, 5003, torch.float32, {"label_smoothing": 0.1}), id="smoothing"),
    pytest.param(Case(8, 5003, torch.float32, {"softcap": 30.0}), id="softcap"),
    pytest.param(Case(8, 5003, torch.float32, {"return_stats": True}), id="stats"),
    pytest.param(
        Case(4, 20000, torch.float32, {"label_smoothing": 0.1, "return_stats": True}, busy=False), id="split-all"
    ),
    pytest.param(Case(8, 5003, torch.float32, {"inplace_backward": True}), id="inplace"),
]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_traffic_is_the_fewest(case, share):
    moved = measure(case, share)
    kept, ignored = moved.kept, ~moved.kept
    assert ignored.sum() == round(share * case.N)
    assert (moved.forward.reads[kept] <= 1.01).all()
    assert (moved.forward.reads[kept] >= 1.0).all()
    assert (moved.forward.reads[ignored] == 0).all()
    assert (moved.forward.writes == 0).all()
    assert (moved.backward.reads[kept] <= 1.01).all()
    assert (moved.backward.reads[ignored] == 0).all()
    assert (moved.backward.writes == 1.0).all()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_all_other_tensors_add_little(share):
    """With a language model's vocabulary, targets, losses and sums add at most 1% to the bytes of the logits."""
    moved = measure(Case(4, 32000, torch.float32), share)
    assert moved.forward.total <= 1.01 * moved.forward.bound
    assert moved.backward.total <= 1.01 * moved.backward.bound


@pytest.mark.parametrize("busy", [True, False])
def test_few_rows_are_split(busy):
    """Programs write sums of their parts of a row, unless the case has `busy`."""
    with Traffic() as traffic:
        measure(Case(4, 20000, torch.float32, busy=busy), 0.0)
    forward = traffic.launches[0]
    assert [launch.kernel for launch in traffic.launches] == ["forward_kernel", "reduce_kernel", "backward_kernel"]
    written = forward.bytes("store")
    assert (written > 4 * 5 * 8) == (not busy)  # sums of every part, instead of five numbers per row


@triton.jit
def twice_kernel(x_ptr, out_ptr, V, BLOCK_V: tl.constexpr):
    """Loads a row twice and stores it once, with masks. Every program also loads the first element without a mask."""
    offs_v = tl.program_id(0) * V + tl.arange(0, BLOCK_V)
    mask_v = tl.arange(0, BLOCK_V) < V
    x = tl.load(x_ptr + offs_v, mask=mask_v)
    x += tl.load(x_ptr + offs_v, mask=mask_v)
    tl.store(out_ptr + offs_v, x + tl.load(x_ptr), mask=mask_v)


def test_the_meter_sees_what_is_too_much():
    x, out = torch.randn(3, 8), torch.zeros(3, 8)
    with Traffic() as traffic:
        twice_kernel[(3,)](x, out, 8, BLOCK_V=16)
    (launch,) = traffic.launches
    row = 8 * 4
    np.testing.assert_array_equal(launch.row_bytes("load", "x_ptr"), [2 * row + 3 * 4, 2 * row, 2 * row])
    np.testing.assert_array_equal(launch.row_bytes("store", "out_ptr"), [row, row, row])
    assert launch.row_bytes("store", "x_ptr").sum() == launch.row_bytes("load", "out_ptr").sum() == 0
    assert launch.bytes("load") == 3 * 2 * row + 3 * 4
    assert launch.bytes("store") == 3 * row
    torch.testing.assert_close(out, 2 * x + x[0, 0])


def test_the_meter_leaves_nothing_behind():
    x, out = torch.randn(3, 8), torch.zeros(3, 8)
    with Traffic() as traffic:
        pass
    twice_kernel[(3,)](x, out, 8, BLOCK_V=16)
    assert traffic.launches == []


def test_shared_memory_belongs_to_the_first_parameter():
    x = torch.randn(3, 8)
    with Traffic() as traffic:
        twice_kernel[(3,)](x, x, 8, BLOCK_V=8)
    assert traffic.launches[0].row_bytes("store", "x_ptr").sum() == x.numel() * 4
    assert traffic.launches[0].row_bytes("store", "out_ptr").sum() == 0


def test_rows_of_strided_tensors():
    """Row 1 is every second element of the second column; its neighbours are not counted for it."""
    x = torch.randn(16, 3)[::2].t()
    out = torch.zeros(1, 8)
    with Traffic() as traffic:
        gather_kernel[(1,)](x[1:], out, x.stride(1), BLOCK_V=8)
    launch = traffic.launches[0]
    launch.tensors["x_ptr"] = x
    np.testing.assert_array_equal(launch.row_bytes("load", "x_ptr"), [0, 32, 0])


@triton.jit
def gather_kernel(x_ptr, out_ptr, stride_xv, BLOCK_V: tl.constexpr):
    offs_v = tl.arange(0, BLOCK_V)
    tl.store(out_ptr + offs_v, tl.load(x_ptr + offs_v * stride_xv))


def test_vocabulary_blocks_are_read_once():
    """With launches on parts of the vocabulary, as in the linear loss, no logit of an ignored row is read."""
    from fused_ignore_ce.kernels import cross_entropy

    V, width = 5003, 1700
    x = torch.randn(1, 8, V)
    target = torch.tensor([0, -100, 1699, 1700, 5002, -100, 7, 3400])
    options = LossOptions(label_smoothing=0.1)
    starts = range(0, V, width)
    parts = cross_entropy.new_parts(x, len(starts), False)
    with Traffic() as traffic:
        for part, start in enumerate(starts):
            block = x[:, :, start : start + width].contiguous()
            cross_entropy.forward_part(
                (block, target, None, None), options, parts=parts, part=part, block=Block(start, V), with_stats=False
            )
    read = sum(launch.row_bytes("load", "logits.x") for launch in traffic.launches)
    kept = (target != -100).numpy()
    assert (read[kept] == 4 * (V + 1)).all()  # and the target's logit, where it is
    assert (read[~kept] == 0).all()
    outputs = cross_entropy.merge(target, parts, options, with_stats=False)
    whole = cross_entropy.forward((x, target, None, None), options, with_stats=False)
    torch.testing.assert_close(outputs[0], whole[0])
