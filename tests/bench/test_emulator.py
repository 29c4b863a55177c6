"""Compiled kernels, executed without a GPU: that right ones are right, and that faults are found."""

import pytest

pytest.importorskip("triton")

from bench.proofs.emulator import ptx
from bench.proofs.emulator.instructions import expression
from bench.proofs.emulator.translating import translate

from .test_proofs_compiled import worker

NAMES = "forward", "merge", "backward", "one_pass", "reduce", "total", "scale", "distillation", "distillation_backward"
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
        ("target", "DeviceAssertion: forward_kernel"),
    ],
)  # fmt: skip
def test_a_fault_of_memory_is_found(fault, said, faults):
    assert said in faults[fault]


@pytest.mark.parametrize("fault", ["cast", "sign of a shift"])
def test_a_fault_of_numbers_is_found(fault, faults):
    assert faults[fault] > 1e-4


def test_an_assertion_has_its_message(faults):
    assert "fused_ignore_ce: target out of range [0, number of classes)" in faults["target"]
    assert "forward.py:" in faults["target"]


def test_every_kernel_option_and_dtype_is_as_right_as_pytorch(tmp_path):
    """A selection for every run. `make test-compiled` runs the tests of the kernels on compiled code."""
    found = worker("selection", tmp_path, "emulator_worker.py")
    assert set(found["kernels"]) == KERNELS
    for name, (ours, pytorch) in found["errors"].items():
        assert len(ours) >= 2
        for error, allowed in zip(ours, pytorch, strict=True):
            assert error <= 4 * allowed + 8, f"{name}: off by {ours} units in the last place, PyTorch by {pytorch}"


def test_a_copy_arrives_when_it_is_waited_for_and_not_before(small):
    assert small["waited"] == [True, False]
    assert small["not waited"] == [False, True]  # all NaN


def test_what_is_executed_is_counted(small):
    forward = small["forward"]
    assert 1 < forward["logits read"] < 1.1  # each logit once, and by every thread the target and its logit
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
    power = ptx.Instruction("ex2.approx.ftz.f32", ("%r1", "%r2"))
    assert expression(power, ["a"]) == "to_f32(ftz(ex2_approx(ftz(from_f32(a)))))"
