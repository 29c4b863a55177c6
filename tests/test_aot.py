"""Every kernel compiles for GPUs that are not here, without spills and with wide accesses; and what judges can fail."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.proofs import aot
from bench.proofs.cubin import Cubin, access_widths

ROOT = Path(__file__).parents[1]
WIDE = {"load x_ptr": 16, "store dx_ptr": 16}
JOB = aot.Job("backward_kernel", 90, "bfloat16", aot.Shape(529, 1, 32000, contiguous=True), ())
GOOD = aot.Report(JOB, Cubin(BLOCK_N=1, BLOCK_V=4096, num_warps=8, registers=40, spill=0, shared=0, widths=WIDE))


def test_quick_run_is_green(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.proofs.aot", "--quick", "--json", tmp_path / "reports.json"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert {r["job"]["kernel"] for r in reports} == {"forward_kernel", "merge_kernel", "backward_kernel"}
    assert all(r["cubin"]["registers"] > 0 for r in reports)


def changed(**values):
    return dataclasses.replace(GOOD, cubin=dataclasses.replace(GOOD.cubin, **values))


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        (GOOD, None),
        (changed(spill=8), "spills 8 bytes"),
        (changed(widths=WIDE | {"load x_ptr": 2}), "load x_ptr 2 bytes wide, not 16"),
        (changed(widths=WIDE | {"store dx_ptr": 8}), "store dx_ptr 8 bytes wide, not 16"),
        (changed(widths={"load x_ptr": 16}), "no store dx_ptr found"),
        (aot.Report(JOB, None, error="PTXASError"), "PTXASError"),
    ],
    ids=["good", "spill", "narrow-load", "narrow-store", "no-store", "does-not-compile"],
)
def test_judgement(report, fault):
    assert aot.faults(report) == ([] if fault is None else [fault])


def test_strided_classes_must_be_read_along_rows():
    shape = aot.Shape(1, 64, 32, contiguous=False)
    tile = {"BLOCK_N": 64, "BLOCK_V": 32, "num_warps": 4, "widths": dict.fromkeys(WIDE, 2)}
    for rows_fastest, fault in ((True, []), (False, ["neighbouring threads do not access neighbouring rows"])):
        report = changed(**tile, rows_fastest=rows_fastest)
        assert aot.faults(dataclasses.replace(report, job=dataclasses.replace(JOB, shape=shape))) == fault


def test_tiles_of_few_elements_owe_less():
    """16 bytes are due of 8 elements a thread, and what a thread has of fewer."""
    shape = aot.Shape(529, 1, 64, contiguous=True)
    job = dataclasses.replace(JOB, shape=shape)
    assert aot.bytes_due(job, changed(BLOCK_N=1, BLOCK_V=64, num_warps=2).cubin) == 2
    assert aot.bytes_due(job, changed(BLOCK_N=4, BLOCK_V=64, num_warps=2).cubin) == 8
    assert aot.bytes_due(job, changed(BLOCK_N=16, BLOCK_V=64, num_warps=2).cubin) == 16


def test_every_tile_that_a_launcher_chooses_is_compiled():
    known = {aot.tile_of(shape) for shape in aot.shapes(2)}
    rng = random.Random(0)
    for _ in range(3000):
        B, T, V = (int(2 ** rng.uniform(0, limit)) for limit in (9, 17, 19))
        shape = aot.Shape(B, T, V, contiguous=rng.random() < 0.5)
        assert aot.tile_of(shape) in known, shape


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
    """`%rd5` depends on a loaded value; that `%r1` does too, later, says nothing of `%r2`, which had its zero."""
    assert access_widths(PTX, ["x_ptr", "V", "dx_ptr"]) == {"load x_ptr": 2, "store dx_ptr": 8}


@pytest.mark.parametrize(("other", "width"), [("", 16), ("ld.global.b16 { %rs3 }, [ %rd1 + 0 ];", 2)])
def test_an_address_out_of_shared_memory_is_the_second_choice(other, width):
    """It may be a gather (the b16) or a row that changed threads (the v4)."""
    ptx = f"""
	ld.param.b64 	%rd1, [k_param_0];
	ld.shared.b32 	%r1, [%r9];
	mad.wide.s32 	%rd3, %r1, 2, %rd1;
	ld.global.v4.b32 {{ %r3, %r4, %r5, %r6 }}, [ %rd3 + 0 ];
	ld.global.b16 {{ %rs1 }}, [ %rd3 + 0 ];
	{other}
    """
    assert access_widths(ptx, ["x_ptr"]) == {"load x_ptr": width}
