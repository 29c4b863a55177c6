"""Compiled kernels, executed without a GPU: that right ones are right, and that faults are found."""

import pytest

pytest.importorskip("triton")

import torch

from bench.proofs.emulator import ptx
from bench.proofs.emulator.building import LOCKSTEP, Compiled
from bench.proofs.emulator.instructions import expression
from bench.proofs.emulator.tensors import Memory
from bench.proofs.emulator.translating import translate

from .test_proofs_compiled import worker

NAMES = ["forward", "merge", "backward", "one_pass", "on_chip", "reduce", "total", "scale"]
NAMES += ["distillation", "distillation_backward", "others", "others_backward"]
KERNELS = {f"{name}_kernel" for name in NAMES}

HEAD = ".visible .entry kernel(\n.param .u64 kernel_param_0\n)\n.reqntid 32\n{\n.reg .b32 %r<9>;\n.reg .pred %p<9>;\n"


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return worker("faults", tmp_path_factory.mktemp("cache"), "emulator_worker.py")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return worker("small", tmp_path_factory.mktemp("cache"), "emulator_worker.py")


def test_a_copy_without_a_fault_is_right_in_all_orders_of_warps(faults):
    assert faults["none"] < 1e-6


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("mask", "outside of every tensor passed (24000 bytes after the first element of a 6x1000 torch.float32"),
        ("stride", "outside of every tensor passed"),
        ("barrier", "a race in shared memory"),
        ("stores", "stores another value there: no barrier between the two"),
        ("target", "DeviceAssertion: forward_kernel"),
    ],
)
def test_a_fault_of_memory_is_found(fault, said, faults):
    assert said in faults[fault]


@pytest.mark.parametrize("fault", ["cast", "sign of a shift"])
def test_a_fault_of_numbers_is_found(fault, faults):
    assert faults[fault] > 1e-4


def test_an_assertion_has_its_message(faults):
    assert "fused_ignore_ce: target out of range [0, number of classes)" in faults["target"]
    assert "forward.py:" in faults["target"]


def test_every_kernel_option_and_dtype_is_as_right_as_pytorch(tmp_path):
    """A selection for every run. `make test-compiled` runs the tests of the kernels on compiled code.

    It is also read and written no more than it must be, which belongs to this test because compiling takes a minute.
    """
    found = worker("selection", tmp_path, "emulator_worker.py")
    assert set(found["kernels"]) == KERNELS
    for name, (ours, pytorch) in found["errors"].items():
        assert len(ours) >= 2
        for error, allowed in zip(ours, pytorch, strict=True):
            assert error <= 4 * allowed + 8, f"{name}: off by {ours} units in the last place, PyTorch by {pytorch}"
    for name, kernels in found["traffic"].items():
        assert kernels or name == "many"
        for kernel, tensors in kernels.items():
            check_traffic(f"{name}, {kernel}", kernel, tensors, 2 if "two walks" in name else 1)


def check_traffic(name, kernel, tensors, walks):
    """Each logit of a kept row is read once in a walk, and no other; every gradient is written once.

    Besides, every warp of a program reads the target's logit, and for statistics the largest one. The kernel on the
    chip writes the target's gradient again.
    """
    reads = {"distillation_kernel": walks, "one_pass_kernel": 2}.get(kernel, 1)
    writes = any(tensor["written"][1] for tensor in tensors)
    if kernel == "distillation_kernel" and writes:
        reads += 1
    assert writes or kernel in ("forward_kernel", "distillation_kernel", "others_kernel"), name
    for tensor in tensors:
        (least, most), (least_written, written) = tensor["read"], tensor["written"]
        little = 0.005 + 32 / tensor["classes"]
        assert tensor["read of ignored"] == 0, f"{name}: {tensors}"
        assert (least, most) == (0, 0) or reads <= least <= most <= reads + little, f"{name}: {tensors}"
        assert least_written == written == 0 or 1 <= least_written <= written <= 1 + little, f"{name}: {tensors}"


def test_kernels_that_move_too_much_are_seen(small):
    """Rows are read twice and written once; besides, each of three programs reads the first element."""
    read, (read_out, written) = small["read twice, written once"]
    assert read == [[2 + 3, *[2] * 39], [2] * 40, [2] * 40]
    assert read_out == [[0] * 40] * 3
    assert written == [[1] * 40] * 3
    assert small["bytes"] == 4 * (3 * 40 * 3 + 3)
    assert small["gathered"] == [[1] * 32, False]


def test_a_scale_of_1_moves_nothing(small):
    assert small["scaled by 1"] == [0, 0]


def test_vocabulary_blocks_are_read_once(small):
    for row, read in enumerate(small["parts"]):
        assert read == 0 if row in (1, 5) else 1 <= read < 1.01


def test_launches_are_those_of_a_chip_of_the_architecture(small):
    """Before sm_80, no kernel keeps its row in shared memory."""
    assert small["chips"] == [[75, 0], [80, 164 << 10]]


def test_a_copy_arrives_when_it_is_waited_for_and_not_before(small):
    assert small["waited"] == [True, False]
    assert small["not waited"] == [False, True]  # all NaN


def test_what_is_executed_is_counted(small):
    forward = small["forward"]
    assert 1 < forward["logits read"] < 1.1  # each logit once, and by every thread the target and its logit
    assert 1 < forward["sectors"] < 1.1  # each logit once, in whole sectors of 16, and the target and its logit
    assert forward["bank conflicts"] == small["backward"]["bank conflicts"] == 0
    assert small["backward"]["sectors"] < 1.1
    assert small["backward"]["sectors written"] * 32 == small["backward"]["written"] == 600 * 16384 * 2
    assert 1 < forward["powers"] < 2  # one for a logit, and those of shifts
    assert forward["written"] == 600 * 4 * 4  # a row's loss, c, s and mass


def test_a_promise_of_alignment_that_does_not_hold_is_found(small):
    assert "an access of 16 bytes whose address is no multiple of that (4 bytes after" in small["misaligned"]


def test_a_race_between_programs_is_found(small):
    assert "a race with program 0" in small["programs"]


def test_numbers_are_converted_as_pytorch_does(small):
    assert small["conversions"] == [True, True, True]


@pytest.mark.parametrize("statement", ["add.s32 %r1, %r2;", "ex3.approx.f32 %r1, %r2;", "cvt.rn.sat.f32.f64 %r1, %r2;"])
def test_what_is_not_known_is_an_error(statement):
    with pytest.raises(ptx.NotUnderstood, match="unknown instruction"):
        translate(ptx.read(f"{HEAD}{statement}\nret;\n}}"), 0)


@pytest.mark.parametrize(
    "line", [".branchtargets A;", "ld.global.volatile.b32 %r1, [%r2];", "bar.sync 1;", "shfl.sync.bfly.b32 %r1, %r2;"]
)
def test_other_statements_that_are_not_known_are_errors_too(line):
    with pytest.raises(ptx.NotUnderstood):
        translate(ptx.read(f"{HEAD}{line}\nret;\n}}"), 0)


def test_approximate_instructions_are_off_and_exact_ones_are_not():
    add = ptx.Instruction("add.f32", ("%r1", "%r2", "%r3"))
    assert expression(add, ["a", "b"]) == "to_f32((float)from_f32(a) + (float)from_f32(b))"
    mixed = ptx.Instruction("sub.rn.f32.bf16", ("%r1", "%rs2", "%r3"))
    assert expression(mixed, ["a", "b"]) == "to_f32(from_bf16(a) - from_f32(b))"
    power = ptx.Instruction("ex2.approx.ftz.f32", ("%r1", "%r2"))
    assert expression(power, ["a"]) == "to_f32(ftz(ex2_approx(ftz(from_f32(a)))))"


@pytest.mark.parametrize(
    ("code", "device", "shared"),
    [  # (requests, sectors) of device memory, (parts, wavefronts) of shared memory, by 32 threads
        ("shl.b32 %r2, %r1, 2; {global}", (1, 4), (0, 0)),
        ("shl.b32 %r2, %r1, 4; {global}", (1, 16), (0, 0)),
        ("shl.b32 %r2, %r1, 5; {global}", (1, 32), (0, 0)),
        ("shl.b32 %r2, %r1, 4; {wide}", (1, 16), (0, 0)),
        ("mov.b32 %r2, 0; {global} {global}", (2, 2), (0, 0)),
        ("shl.b32 %r2, %r1, 2; {shared}", (0, 0), (1, 1)),
        ("shl.b32 %r2, %r1, 3; {shared}", (0, 0), (1, 2)),
        ("shl.b32 %r2, %r1, 7; {shared}", (0, 0), (1, 32)),
        ("shl.b32 %r2, %r1, 1; {narrow}", (0, 0), (1, 1)),
        ("shl.b32 %r2, %r1, 4; {pairs}", (0, 0), (2, 4)),
        ("mov.b32 %r2, 0; {read}", (0, 0), (1, 1)),
    ],
)
def test_sectors_and_bank_conflicts_are_counted(code, device, shared, tmp_path):
    accesses = {
        "global": "cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2; ld.global.b32 %r3, [%rd3];",
        "wide": "cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2; ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd3];",
        "shared": "st.shared.b32 [%r2+1024], %r1;",
        "narrow": "cvt.u16.u32 %rs1, %r1; st.shared.b16 [%r2+1024], %rs1;",
        "pairs": "st.shared.v2.b32 [%r2+1024], {%r1, %r1};",
        "read": "ld.shared.b32 %r3, [%r2+1024];",
    }
    head = HEAD.replace(".reg .b32", ".reg .b16 %rs<9>;\n.reg .b64 %rd<9>;\n.reg .b32")
    start = "mov.u32 %r1, %tid.x;\nld.param.b64 %rd1, [kernel_param_0];\n"
    statements = (start + code.format(**accesses)).replace("; ", ";\n")
    kernel = Compiled(f"{head}{statements}\nret;\n}}", 8192, tmp_path)
    x = torch.zeros(1024)
    kernel.run((1, 1, 1), [x.data_ptr().to_bytes(8, "little")], Memory([x]), LOCKSTEP, 0.0)
    counts = kernel.counts()
    assert (counts.read.requests, counts.read.sectors) == device
    assert (counts.shared_parts, counts.shared_wavefronts) == shared
    assert counts.bank_conflicts == shared[1] - shared[0]
    again = Compiled(f"{head}{statements}\nret;\n}}", 8192, tmp_path)  # the same library, which has counted already
    again.run((1, 1, 1), [x.data_ptr().to_bytes(8, "little")], Memory([x]), LOCKSTEP, 0.0)
    assert again.counts() == counts
