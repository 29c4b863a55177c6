"""The arithmetic of kernel proofs: each bound can be the limit, and each fault can be found. Nothing is compiled."""

import dataclasses
import json
import math
import random

import pytest

pytest.importorskip("triton")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from bench.proofs import chips, compiling, judging, lru, predicting, roof
from bench.proofs.cases import Case
from bench.proofs.machine_code import Block, Instruction, MachineCode, Usage

H200 = chips.chip("H200")


class BruteForce:
    """A cache as its definition has it: a block is there if fewer than `capacity` others were accessed since."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.history = []

    def access(self, block):
        since = self.history[::-1]
        hit = block in since and len(set(since[: since.index(block)])) < self.capacity
        self.history.append(block)
        return hit


@pytest.mark.parametrize("capacity", [1, 2, 5, 9])
def test_cache_equals_its_definition(capacity):
    rng = random.Random(capacity)
    fast, slow = lru.Cache(capacity), BruteForce(capacity)
    hits = [(fast.access(block), slow.access(block)) for block in (rng.randrange(10) for _ in range(500))]
    assert all(a == b for a, b in hits)
    assert 0 < sum(a for a, _ in hits) < len(hits)


def test_row_of_one_pass_by_hand():
    """A row of four blocks is read forward, then backwards. A cache of two blocks still has the last two."""
    cache = lru.Cache(2)
    hits = [cache.access(block) for block, read in lru.accesses(0, 4, in_place=True, backwards=True) if read]
    assert hits == [False] * 4 + [True, True, False, False]
    cache = lru.Cache(2)
    hits = [cache.access(block) for block, read in lru.accesses(0, 4, in_place=True, backwards=False) if read]
    assert hits == [False] * 8


def test_reads_of_a_simulated_launch():
    MB = 2**20
    assert lru.reads(8, MB, 100 * MB, in_place=False, backwards=True) == 1.0
    assert lru.reads(8, MB, MB // 32, in_place=False, backwards=True) > 1.9
    # More rows in flight miss more; a gradient with memory of its own does too; the end of a row is found again.
    growing = [lru.reads(rows, MB, 8 * MB, in_place=False, backwards=True) for rows in (2, 4, 8, 16, 32)]
    assert growing == sorted(growing)
    assert growing[0] == 1.0 < growing[-1]
    assert lru.reads(8, MB, 8 * MB, in_place=True, backwards=True) < growing[2]
    assert growing[-1] < lru.reads(32, MB, 8 * MB, in_place=False, backwards=False)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "resident"),
    [
        (32, 256, 0, 2048),
        (40, 256, 0, 1536),
        (41, 256, 0, 1280),  # rounded up to 48
        (64, 1024, 0, 1024),
        (128, 1024, 0, 0),  # so many threads have at most 64 registers each
        (32, 32, 0, 1024),  # 32 programs at most
        (32, 256, 100 * 1024, 512),
    ],
)
def test_resident_threads(registers, threads, shared, resident):
    assert chips.resident_programs(H200, registers, threads, shared) * threads == resident


def block(instructions, loads=0, stores=0, special=0, guard="", name="FADD", width=128):
    """A block of `instructions` in all: first the loads, then a use of each, then the others, and stores at the end."""
    loaded = [Instruction(guard, f"LDG.E.{width}", (f"R{8 * i}", "[R200.64]")) for i in range(loads)]
    used = [Instruction("", "FADD", ("R201", f"R{8 * i}", "R202")) for i in range(loads)]
    stored = [Instruction(guard, f"STG.E.{width}", ("[R204.64]", "R208"))] * stores
    mufu = [Instruction("", "MUFU.EX2", ("R201", "R201"))] * special
    rest = instructions - len(loaded) - len(used) - len(stored) - len(mufu)
    assert rest >= 0
    return Block((*loaded, *used, *mufu, *[Instruction("", name, ("R202", "R203"))] * rest, *stored))


def code(*loops, outside=None, registers=32, rounds=1, shared=0, stack=0):
    return MachineCode(Usage(registers, stack, shared), outside or block(0), loops, (), rounds)


def work(writes=False, V=131072, threads=256, **more):
    return roof.Work(rows=8192, classes=V, itemsize=2, programs=8192, threads=threads, writes=writes, **more)


@pytest.mark.parametrize(
    ("kernel", "launched", "limit"),
    [
        (code(block(112, loads=2)), work(), "bytes"),
        (code(block(320, loads=2)), work(), "issue slots"),
        (code(block(112, loads=2, special=40)), work(), "special functions"),
        (code(block(56, loads=1), registers=128), work(), "waiting"),
        (code(block(112, loads=2), block(112, loads=2, stores=2), registers=24), work(writes=True), "L2 misses"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_bound_can_be_the_limit(kernel, launched, limit):
    prediction = roof.predict(kernel, launched, H200)
    assert prediction.limit == limit
    assert prediction.share < prediction.bounds[limit] <= 1


def test_issue_slots_by_hand():
    """132 multiprocessors at 1.755 GHz have 128 issue slots. Memory moves 2.4e12 logits/s."""
    prediction = roof.predict(code(block(320, loads=2)), work(), H200)
    assert prediction.bounds["issue slots"] == pytest.approx(132 * 1.755e9 * 128 / 20 / 2.4e12, rel=1e-6)
    assert prediction.seconds_a_logit == pytest.approx(1 / (2.4e12 * prediction.share))


def test_waiting_by_hand():
    """Per multiprocessor, two programs of 256 threads ask for 8 logits a thread, and wait for them each time."""
    kernel = code(block(56, loads=1), registers=128)
    prediction = roof.predict(kernel, work(), H200, roof.Constants(1.0, 1.0, wait=800e-9))
    assert prediction.resident_threads == 512
    assert prediction.bounds["waiting"] == pytest.approx(132 * 2 * 256 * 8 / 800e-9 / 2.4e12, rel=1e-3)


def test_the_second_walk_of_one_pass_waits_for_the_first():
    first, second = block(160, loads=2), block(160, loads=2, stores=2)
    tile = 16 * 256
    assert roof.cost(code(first), work(V=tile)).rounds * 16 == 1
    assert roof.cost(code(first, second), work(V=tile)).rounds * 16 == 2
    assert roof.cost(code(first, second), work(V=3 * tile)).rounds * 3 * 16 == 2 + 2 + 2


def asked(programs, issue=3.0, special=0.0, rounds=4.0):
    return roof.Demand(issue, special, rounds, programs, multiprocessors=1, rows=1, reads=1)


def test_programs_of_a_multiprocessor_take_turns():
    """Alone, a program computes and waits. Two meet at the issue slots; many leave them no pause."""
    assert asked(1).multiprocessor(wait=1.0) == 3 + 4
    assert asked(2).multiprocessor(wait=1.0) == pytest.approx((4 + 3 * (1 + 3 / 7)) / 2)
    times = [asked(programs).multiprocessor(1.0) for programs in range(1, 33)]
    assert times == sorted(times, reverse=True)
    assert all(time >= max(3, 7 / programs) for programs, time in enumerate(times, 1))
    assert times[-1] == pytest.approx(3, rel=0.01)
    assert asked(1, special=5.0).multiprocessor(1.0) == 5 + 4


def test_memory_and_multiprocessors_hide_each_other_in_part():
    needed, launched = asked(1, 3e-12, 0, 0), work()
    constants = roof.Constants(stream=0.5, cache=1.0, wait=1e-6)
    assert roof.seconds(needed, launched, H200, constants) == pytest.approx(math.hypot(3e-12, 2 / 2.4e12))


def test_what_is_outside_of_loops_is_spread_over_the_logits_of_a_program():
    kernel = code(block(160, loads=2), outside=block(1000))
    assert roof.cost(kernel, work(V=2**17)).instructions == pytest.approx(10 + 1000 * 256 / 2**17)
    split = dataclasses.replace(work(V=2**17), programs=4 * 8192)
    assert roof.cost(kernel, split).instructions == pytest.approx(10 + 4 * 1000 * 256 / 2**17)
    # A program for many rows executes the code outside of its loops again for each of them.
    persistent = dataclasses.replace(work(V=2**17), programs=132)
    assert roof.cost(kernel, persistent) == roof.cost(kernel, work(V=2**17))


def test_a_tail_that_has_nothing_to_do_does_not_count():
    loop, tail = block(160, loads=2), block(200, loads=2, guard="@P0")
    kernel = code(loop, outside=tail)
    tile = 16 * 256
    exact = roof.cost(kernel, work(V=8 * tile))
    assert exact.instructions * 8 * 16 == pytest.approx(8 * 160 + 200 - 160)
    one_more = roof.cost(kernel, work(V=8 * tile + 256))
    assert one_more.instructions * (8 * 16 + 1) == pytest.approx(8 * 160 + 200)
    # Code outside of loops that loads less than a tile is not the tail's.
    assert roof.cost(code(loop, outside=block(200)), work(V=8 * tile)).instructions * 128 == pytest.approx(
        8 * 160 + 200
    )


def test_few_programs_need_not_fill_a_multiprocessor():
    registers = code(block(112, loads=2), registers=48)
    assert judging.faults(changed(code=registers)) == ["1280 resident threads, not 1536"]
    assert judging.faults(changed(code=registers, grid=(4 * 132, 1, 1))) == []


def test_unrolled_loops_take_what_they_can_and_masked_ones_the_rest():
    unrolled, single, masked = block(400, loads=8), block(110, loads=2), block(120, loads=2, guard="@P0")
    runs = roof.trips([masked, single, unrolled], 64 * 3 + 16 + 3, 2)
    assert runs == [(unrolled, 3), (single, 1), (masked, 1)]
    larger = block(800, loads=16, guard="@P0")
    assert roof.trips([larger, single], 16 * 2 + 3, 2) == [(single, 2), (larger, 1)]


GOOD_CASE = Case("forward", 1, 8192, 32000)
GOOD = compiling.Proof(
    compiling.Job(GOOD_CASE, compiling.Target("cuda", 90)),
    kernel="forward_kernel",
    grid=(8192, 1, 1),
    num_warps=8,
    tile=(1, 2, 256, 8),
    code=code(block(112, loads=2), registers=40),
    widths={"load logits.x": 16},
)


def changed(job=GOOD.job, **values):
    return dataclasses.replace(GOOD, job=job, **values)


def job(**values):
    return dataclasses.replace(GOOD.job, case=dataclasses.replace(GOOD_CASE, **values))


BARRIER = Block((*block(100, loads=2).code, Instruction("", "BAR.SYNC.DEFER_BLOCKING", ("0x0",))))
SHUFFLE = Block((*block(100, loads=2).code, Instruction("", "SHFL.BFLY", ("PT", "R1", "R2", "0x1", "0x1f"))))


@pytest.mark.parametrize(
    ("proof", "fault"),
    [
        (GOOD, None),
        (changed(error="PTXASError"), "PTXASError"),
        (changed(code=code(block(112, loads=2), registers=40, stack=8)), "spills 8"),
        (changed(code=code(block(112, loads=2, name="LDL"), registers=40)), "spills 108"),
        (changed(widths={"load logits.x": 2}), "load logits.x 2 bytes wide, not 16"),
        (changed(widths={}), "no load logits.x found"),
        (changed(code=code(block(129, loads=2), registers=40)), "8.1 instructions a logit, not 8"),
        (changed(code=code(BARRIER, registers=40)), "1 barriers in its loops"),
        (changed(code=code(SHUFFLE, registers=40)), "1 shuffles in its loops"),
        (changed(code=code(block(112, loads=2), registers=48)), "1280 resident threads, not 1536"),
        (
            changed(job(contiguous=False), widths={"load logits.x": 2}, tile=(16, 1, 32, 1), rows_together=False),
            "neighbouring threads do not access neighbouring rows",
        ),
        (
            changed(code=None, amd={"vgpr_spill_count": 3, "private_segment_fixed_size": 0}),
            "vgpr_spill_count 3",
        ),
        (
            changed(code=None, amd={"vgpr_spill_count": 0, "private_segment_fixed_size": 16}),
            "private_segment_fixed_size 16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_judgement(proof, fault):
    assert judging.faults(proof) == ([] if fault is None else [fault])


def test_both_walks_of_one_pass_count():
    case = dataclasses.replace(GOOD_CASE, operation="one pass")
    walks = code(block(112, loads=2), block(160, loads=2, stores=2), registers=64)
    widths = {"load logits.x": 16, "store gradients.dx": 16}
    proof = changed(dataclasses.replace(GOOD.job, case=case), kernel="one_pass_kernel", code=walks, widths=widths)
    assert judging.loop_instructions(proof) == 17
    assert judging.faults(proof) == []
    worse = dataclasses.replace(proof, code=code(block(113, loads=2), walks.loops[1], registers=64))
    assert judging.faults(worse) == ["17.1 instructions a logit, not 17"]


def test_loops_over_shared_memory_count():
    """On the chip, both walks read shared memory: by two loads of 16 bytes an iteration, which are 16 logits."""
    case = dataclasses.replace(GOOD_CASE, operation="on chip")
    held = (Instruction("", "LDS.128", ("R0", "[R8]")),) * 2
    sums, gradient = (Block(block(count).code + held) for count in (94, 122))
    widths = {"load logits.x": 16, "store gradients.dx": 16}
    proof = changed(
        dataclasses.replace(GOOD.job, case=case), kernel="on_chip_kernel", code=code(sums, gradient, registers=64),
        widths=widths,
    )  # fmt: skip
    assert judging.loop_instructions(proof) == (sums.instructions + gradient.instructions) / 16
    assert judging.faults(proof) == []
    long = dataclasses.replace(proof.code, loop_bytes=49153)
    assert judging.faults(dataclasses.replace(proof, code=long)) == ["49153 bytes of code in a loop"]
    assert judging.faults(dataclasses.replace(proof, shared=1 << 20)) == ["1048576 bytes of shared memory"]


def test_a_row_on_the_chip_by_hand():
    """Half of a row is in shared memory, in four pieces, an eighth in registers, and the rest is walked twice.

    A thread has 512 of its logits, and 8 of them an iteration, in every loop.
    """
    held = Instruction("", "LDS.128", ("R0", "[R8]"))
    sums, gradient = (Block((*block(count).code, held)) for count in (79, 119))
    walks = block(100, loads=1, guard="@!P0"), block(200, loads=1, stores=1, guard="@!P0")
    kernel = MachineCode(Usage(128, 0, 0), block(600), walks, (), 1, (sums, gradient), block(30))
    of_row = {"shared": 2**16, "kept": 2**14, "pieces": 4, "in_place": True, "rows_a_program": 1}
    chip = work(writes=True, threads=256, **of_row)
    assert chip.again == 3 / 8
    cost = roof.cost(kernel, chip)
    assert cost.instructions * 512 == 600 + 4 * 30 + 256 / 8 * (80 + 120) + 192 / 8 * (100 + 200)
    # A load, the rounds of both walks over what is read again, and one in between.
    assert cost.rounds * 512 == 1 + 2 * (192 / 8 - 1) + 1
    assert roof.demand(kernel, chip, H200).reads == 2
    whole = dataclasses.replace(chip, shared=2**17 - 2**14)
    assert roof.demand(kernel, whole, H200).reads == 1
    assert roof.cost(kernel, whole).instructions * 512 == 600 + 4 * 30 + 448 / 8 * (80 + 120)


def test_what_the_chip_keeps_is_read_once():
    MB = 2**20
    reads = [lru.reads(8, MB, MB // 32, in_place=True, backwards=True, again=again) for again in (1.0, 0.5, 0.1)]
    assert reads == pytest.approx([2.0, 1.5, 1.1], abs=0.03)
    assert lru.reads(8, MB, 3 * MB, in_place=True, backwards=True, again=0.1) == 1.0


def test_kernels_of_other_shapes_and_launches_have_no_budget():
    slow = code(block(400, loads=2), registers=40)
    for proof in (changed(job(V=1024), code=slow), changed(kernel="merge_kernel", code=slow, widths={})):
        assert judging.faults(proof) == []
    assert judging.faults(changed(code=slow)) == ["25.0 instructions a logit, not 8"]


def test_tiles_of_few_elements_owe_less():
    """An access has to be 16 bytes wide, or as wide as all elements of a thread. Unaligned rows demand no width."""
    for tile, due in (((1, 1, 64, 1), 2), ((4, 1, 32, 2), 2), ((4, 1, 64, 4), 8), ((16, 1, 32, 8), 16)):
        assert judging.bytes_due(changed(tile=tile)) == due
    assert judging.bytes_due(changed(job(V=32001))) == 0


@pytest.mark.parametrize(
    ("rows_in_flight", "classes", "wrong"), [(132, 65536, False), (1320, 65536, True), (1320, 70000, False)]
)
def test_one_pass_has_to_read_once(rows_in_flight, classes, wrong):
    walks = code(block(112, loads=2), block(160, loads=2, stores=2), registers=64)
    launched = work(writes=True, V=classes, threads=1024, in_place=True, rows_a_program=rows_in_flight // 132)
    row = predicting.Row("fused_ignore_ce", "one pass", classes, roof.predict(walks, launched, H200))
    assert bool(predicting.faults([row])) == wrong


AMD = """
    .sgpr_count:     30
    .sgpr_spill_count: 0
    .vgpr_count:     64
    .vgpr_spill_count: 5
    .private_segment_fixed_size: 16
"""


def test_metadata_of_amd():
    assert compiling.amd_usage(AMD)["vgpr_spill_count"] == 5
    with pytest.raises(ValueError, match="lacks vgpr_spill_count"):
        compiling.amd_usage(AMD.replace(".vgpr_spill_count", ".other"))


@pytest.mark.parametrize(("proof", "status"), [(GOOD, 0), (changed(widths={"load logits.x": 8}), 1)])
def test_exit_status(monkeypatch, capsys, tmp_path, proof, status):
    from bench.proofs import __main__ as command

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(command, "jobs", lambda *arguments: [proof.job])
    monkeypatch.setattr(predicting, "every", lambda *arguments: [])
    monkeypatch.setattr(command, "run", lambda jobs: [proof for job in jobs])
    arguments = ["--arch", "90", "--json", str(tmp_path / "proofs.json"), "--keep", str(tmp_path / "kept")]
    arguments += ["--summary", str(tmp_path / "summary.json")]
    monkeypatch.setattr("sys.argv", ["bench.proofs", *arguments])
    assert command.main() == status
    printed = capsys.readouterr().out
    assert predicting.NOTE in printed
    assert ("FAULT" in printed) == bool(status)
    assert predicting.NOTE in (tmp_path / "proofs.json").read_text()
    totals = json.loads((tmp_path / "summary.json").read_text())
    assert (totals["kernels"], totals["targets"], totals["dtypes"]) == (1, ["sm_90"], ["bfloat16"])
    assert (totals["spilling"], totals["narrow"], len(totals["faults"])) == (0, status, status)
    assert totals["note"] == predicting.NOTE
