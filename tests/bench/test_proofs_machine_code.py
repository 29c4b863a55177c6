"""Reading machine code: loops, dependences of loads, widths of accesses."""

import pytest

pytest.importorskip("triton")

from bench.proofs.accesses import access_widths, rows_together
from bench.proofs.dataflow import operands_read, registers, results
from bench.proofs.machine_code import Instruction, Usage, analyse, parse

USAGE = Usage(registers=40, stack=0, shared=1024)

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, desc[UR12][R2.64] ;
        /*0020*/                   ISETP.NE.U32.AND P0, PT, R2, UR14, PT ;
        /*0030*/              @!P0 EXIT ;
        /*0040*/                   LDG.E.U16 R40, desc[UR12][R28.64] ;
.L_x_1:
        /*0050*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_2:
        /*0060*/                   LDG.E.128 R8, desc[UR12][R20.64] ;
        /*0070*/                   LDG.E.128 R12, desc[UR12][R20.64+0x1000] ;
        /*0080*/                   FADD R30, R8, R15 ;
        /*0090*/                   MUFU.EX2 R30, R30 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/              @!P1 BRA `(.L_x_2) ;
        /*00c0*/              @!P2 BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/                   STG.E.128 desc[UR12][R20.64], RZ ;
        /*00e0*/              @!P3 BRA `(.L_x_3) ;
        /*00f0*/                   STG.E desc[UR12][R22.64], R30 ;
        /*0100*/                   EXIT ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4);
        /*0120*/                   NOP;
        /*0130*/                   NOP;
"""


def test_loops():
    found = analyse(LISTING, USAGE)
    [loop] = found.loops
    assert (loop.instructions, loop.special, loop.barriers, loop.shuffles) == (6, 1, 1, 0)
    assert (loop.loaded, loop.stored, loop.masked) == (32, 0, False)
    assert loop.in_flight == 32
    [clear] = found.clears
    assert (clear.instructions, clear.stored) == (2, 16)
    # Two of the outer loop, five before it and two after it. The trap after the end and padding do not count.
    assert found.outside.instructions == 9
    assert found.spills == 0


def test_code_around_loops_over_shared_memory_belongs_to_pieces():
    """A loop of rows, in which a loop of pieces has one of tiles. The first and the last are no pieces' code."""
    listing = """
        /*0000*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_1:
        /*0010*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR12][R20.64] ;
        /*0030*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_3:
        /*0040*/                   LDS.128 R8, [R4] ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
        /*0060*/              @!P2 BRA `(.L_x_2) ;
        /*0070*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0080*/              @!P3 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""
    found = analyse(listing, USAGE)
    assert [(loop.instructions, loop.loaded_shared) for loop in found.held] == [(2, 16)]
    assert (found.pieces.instructions, found.outside.instructions, found.loop_bytes) == (3, 5, 8 * 16)


def test_a_predicated_load_is_masked_and_an_unguarded_one_is_not():
    masked = analyse(LISTING.replace("                   LDG.E.128 R8", "              @!P4 LDG.E.128 R8"), USAGE)
    assert masked.loops[0].masked


def test_spills_show_as_instructions_or_as_stack():
    spilling = LISTING.replace("MUFU.EX2 R30, R30", "STL [R1], R30")
    assert analyse(spilling, USAGE).spills == 1
    assert analyse(LISTING, Usage(40, 24, 0)).spills == 24


def test_rounds_of_loads():
    """The target is loaded first. After the branch on it, the logit and the loop's loads are waited for together."""
    assert analyse(LISTING, USAGE).rounds == 2
    undecided = LISTING.replace("@!P0 EXIT", "     NOP")
    assert analyse(undecided, USAGE).rounds == 1
    gather = LISTING.replace("desc[UR12][R28.64]", "desc[UR12][R2.64]").replace("@!P0 EXIT", "     NOP")
    assert analyse(gather, USAGE).rounds == 2


def test_bytes_in_flight_end_where_they_are_used():
    used_between = LISTING.replace("                   LDG.E.128 R12", "                   FADD R31, R8, R8 ;\n"
                                   "        /*0068*/                   LDG.E.128 R12")  # fmt: skip
    assert analyse(used_between, USAGE).loops[0].in_flight == 16 + 0
    # Loads of the next iteration that are issued before this one's are used.
    ahead = """
.L_x_1:
        /*0000*/                   LDG.E.128 R8, desc[UR12][R20.64] ;
        /*0010*/                   FADD R30, R12, R13 ;
        /*0020*/                   FADD R30, R8, R9 ;
        /*0030*/                   LDG.E.128 R12, desc[UR12][R20.64] ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
"""
    assert analyse(ahead, USAGE).loops[0].in_flight == 32


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        ("@P1 IADD3 R2, P0, R4, UR6, RZ", {"R2", "P0"}, {"P1", "R4", "UR6"}),
        ("IMAD.WIDE R2, R4, 0x2, R6", {"R2", "R3"}, {"R4", "R6"}),
        ("ISETP.GE.AND P2, PT, R2, R5.reuse, P3", {"P2"}, {"R2", "R5", "P3"}),
        ("LDG.E.128 R8, desc[UR12][R20.64]", {"R8", "R9", "R10", "R11"}, {"UR12", "R20", "R21"}),
        ("STG.E.64 desc[UR4][R2.64], R6", set(), {"UR4", "R2", "R3", "R6", "R7"}),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", {"R1"}, {"R2"}),
        ("@!P0 EXIT", set(), {"P0"}),
    ],
)
def test_registers_of_an_instruction(text, written, read):
    [instruction], _ = parse(f"        /*0000*/   {text} ;")
    assert results(instruction) == written
    assert operands_read(instruction) >= read


def test_instruction():
    instruction = Instruction("@P1", "STG.E.U16", ("desc[UR12][R2.64]", "R6"))
    assert (instruction.name, instruction.bytes) == ("STG", 2)
    assert registers("desc[UR12][R2.64+0x4000]") == {"UR12", "R2", "R3"}


PTX = """
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_2];
	mov.b32 	%r1, 0;
	mov.b32 	%r2, %r1;
$L__BB0_1:
	mad.wide.s32 	%rd3, %r2, 2, %rd1;
	@%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd3 + 0 ];
	@%p1 ld.global.b16 { %rs1 }, [ %rd3 + 16 ];
	add.s32 	%r2, %r2, 8;
	mov.b32 	%r1, %r3;
	cvt.s64.s32 	%rd4, %r3;
	add.s64 	%rd5, %rd1, %rd4;
	ld.global.b8 { %rs2 }, [ %rd5 + 0 ];
	@%p2 st.global.v2.b32 [ %rd2 + 0 ], { %r3, %r4 };
	@%p3 bra 	$L__BB0_1;
"""


def test_widths_are_the_narrowest_without_gathers():
    """`%rd5` depends on a loaded value. `%r2` does not: it was copied from `%r1` before that held a loaded value."""
    assert access_widths(PTX, ["x_ptr", None, "dx_ptr"]) == {"load x_ptr": 2, "store dx_ptr": 8}


def test_an_address_that_a_loaded_value_chose_is_a_gather():
    ptx = """
	ld.param.b64 	%rd1, [k_param_0];
	ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd1 + 0 ];
	setp.gt.f32 	%p1, %r3, %r4;
	selp.b32 	%r7, %r8, 0, %p1;
	mad.wide.s32 	%rd2, %r7, 2, %rd1;
	ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    """
    assert access_widths(ptx, ["x_ptr"]) == {"load x_ptr": 16}
    assert access_widths(ptx.replace("%r3, %r4;", "%r8, %r9;"), ["x_ptr"]) == {"load x_ptr": 2}


@pytest.mark.parametrize(("other", "width"), [("", 16), ("ld.global.b16 { %rs3 }, [ %rd1 + 0 ];", 2)])
def test_an_address_out_of_shared_memory_is_the_second_choice(other, width):
    """It may be a gather (the b16) or a row that went to other threads (the v4). Any other access takes precedence."""
    ptx = f"""
	ld.param.b64 	%rd1, [k_param_0];
	ld.shared.b32 	%r1, [%r9];
	mad.wide.s32 	%rd3, %r1, 2, %rd1;
	ld.global.v4.b32 {{ %r3, %r4, %r5, %r6 }}, [ %rd3 + 0 ];
	ld.global.b16 {{ %rs1 }}, [ %rd3 + 0 ];
	{other}
    """
    assert access_widths(ptx, ["x_ptr"]) == {"load x_ptr": width}


@pytest.mark.parametrize(
    ("classes", "thread", "warp", "together"),
    [
        (32, 1, "16, 1, 2, 1", True),
        (32, 1, "1, 1, 32, 1", False),
        (32, 8, "2, 1, 16, 1", True),
        (32, 4, "2, 1, 16, 1", False),
        (2, 1, "16, 1, 2, 1", True),
        (1, 1, "16, 1, 2, 1", None),
    ],
)
def test_threads_of_a_warp_go_along_rows(classes, thread, warp, together):
    ttgir = f"""
#layout = #ttg.blocked<{{sizePerThread = [{thread}, 1, 1, 1], threadsPerWarp = [{warp}], order = [3, 2, 1, 0]}}>
    %1 = tt.load %0 : tensor<16x1x1x1x!tt.ptr<i64>, #other>
    %2 = tt.load %3 : tensor<16x1x{classes}x1x!tt.ptr<bf16>, #layout>
"""
    assert rows_together(ttgir) is together
