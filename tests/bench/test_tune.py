"""The tuner without its clock: what it tries, chooses and writes, and that the launchers use it."""

import itertools
import json
import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from triton.runtime.errors import OutOfResources

from bench import tune
from bench.tuning import search
from bench.tuning.search import Measured, Point
from bench.tuning.trial import Trials
from fused_ignore_ce.kernels import cross_entropy, launch, tables
from fused_ignore_ce.kernels.chip import EMULATED, INTERPRETED
from fused_ignore_ce.kernels.tables import ARITHMETIC, Program
from fused_ignore_ce.kernels.variant import ON_CHIP, ONE_PASS_PLAIN

ABOUT = {"device": "Chip", "date": "2026-01-01", "command": "python -m bench.tune", "versions": {}, "commit": "abc"}

#: By operation and vocabulary, programs that no rule would lead to.
BEST = {
    ("forward", 32000): Program(4, 8, programs=8),
    ("forward", 128256): Program(2, 32, programs=2),
    ("backward", 32000): Program(8, 8, tiles=8, programs=2),
    ("backward", 128256): Program(4, 32, tiles=8, programs=8),
    ("one_pass", 32000): Program(4, 16, programs=8),
    ("one_pass", 128256): Program(8, 32, programs=2),
}
POINTS = [Point(operation, N, V) for N in (8192, 64) for operation, V in BEST]


def made_up(point, chosen):
    """The best program takes a microsecond. Others take longer the more they differ from it."""
    best = search.launch_of(BEST[point.operation, point.V], point, INTERPRETED)
    fields = ("CHUNKS", "num_warps", "split_tiles", "programs")
    return 1e-6 * (1 + sum(abs(getattr(chosen, name) - getattr(best, name)) for name in fields))


def always():
    return True


def test_the_search_finds_the_least_of_a_made_up_cost():
    measured, left_out = search.search(POINTS, INTERPRETED, made_up, always)
    assert left_out == []
    for (operation, V), best in BEST.items():
        assert search.choose(operation, V, measured, INTERPRETED) == best


def test_what_is_written_is_what_the_launchers_take(tmp_path):
    found = tune.tuned(POINTS, INTERPRETED, made_up, 1.0, ABOUT, now=lambda: 0.0)
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"Other": found["table"]}))
    tune.write(path, "Chip", found["table"])
    written = tables.read(path)
    assert written.keys() == {"Other", "Chip"}
    assert "python -m bench.tune" in written["Chip"].reason
    assert written["Chip"].arch == 90
    chip = replace(INTERPRETED, table=written["Chip"])
    for V in (32000, 128256):
        for N in (8192, 64):
            chosen = {
                "forward": launch.forward_launch(1, N, V, 2, True, True, chip),
                "backward": launch.backward_launch(1, N, V, 2, True, True, chip),
                "one_pass": launch.one_pass_launch(N, V, 2, True, ONE_PASS_PLAIN, chip),
            }
            for operation, own in chosen.items():
                point = Point(operation, N, V)
                assert own == search.launch_of(BEST[operation, V], point, INTERPRETED)
                assert made_up(point, own) == 1e-6
    # Every step has its measurements, at both numbers of rows.
    [first, last] = json.loads(path.read_text())["Chip"]["forward"]
    assert (first["row_bytes"], last["row_bytes"]) == (round(2 * (32000 * 128256) ** 0.5), None)
    assert [(each["N"], each["V"]) for each in first["measured"]] == [(8192, 32000), (64, 32000)]
    assert all(each["microseconds"] == each["best"] == 1.0 < each["arithmetic"] for each in first["measured"])
    assert "8192" in tune.summary(found)


def test_out_of_time_keeps_what_was_measured():
    """Time runs out within the third point. Its kernel has no complete point, and keeps its default table."""
    clock = itertools.count()
    launches = [len({search.launch_of(p, point, INTERPRETED) for p in search.candidates(*point[::2], INTERPRETED)})
                for point in POINTS]  # fmt: skip
    calls = []

    def counted(point, chosen):
        calls.append(point)
        return made_up(point, chosen)

    wanted = [POINTS[0], POINTS[1], POINTS[2]]
    tried = sum(len(search.candidates(*point[::2], INTERPRETED)) for point in wanted[:2])
    found = tune.tuned(POINTS, INTERPRETED, counted, tried + 5, ABOUT, now=lambda: next(clock))
    assert [(each["operation"], each["N"], each["V"]) for each in found["times"]] == [tuple(p) for p in wanted[:2]]
    assert found["left out"] == [str(point) for point in POINTS[2:]]
    assert 0 < calls.count(POINTS[2]) < launches[2]
    assert [step["num_warps"] for step in found["table"]["forward"]] == [4, 2]
    kept = [(step["row_bytes"], step["num_warps"], step["tiles"]) for step in found["table"]["backward"]]
    assert kept == [(limit, p.num_warps, p.tiles) for limit, p in ARITHMETIC.backward]
    assert found["table"]["one_pass"] == []


@pytest.mark.parametrize(("reason", "failed"), [("OutOfResources: registers", False), ("wrong: loss differs", True)])
def test_launches_without_room_are_expected_and_others_are_not(reason, failed):
    first = search.launch_of(search.arithmetic("forward", 32000, INTERPRETED), POINTS[0], INTERPRETED)
    found = tune.tuned(
        POINTS[:1], INTERPRETED, lambda _, own: 1.0 if own == first else reason, 1.0, ABOUT, now=lambda: 0.0
    )
    assert bool(found["failed"]) == failed
    assert ("wrong" in tune.summary(found)) == failed
    assert [step["num_warps"] for step in found["table"]["forward"]] == [first.num_warps]


def test_noise_does_not_replace_the_arithmetic_program():
    point = Point("forward", 8192, 32000)
    first = search.launch_of(search.arithmetic("forward", 32000, INTERPRETED), point, INTERPRETED)
    other = search.launch_of(BEST["forward", 32000], point, INTERPRETED)
    for saved, chosen in ((0.01, search.arithmetic("forward", 32000, INTERPRETED)), (0.05, None)):
        clock = {first: 1.0, other: 1.0 - saved}
        [measured], _ = search.search([point], INTERPRETED, lambda _, own, clock=clock: clock.get(own, 2.0), always)
        found = search.choose("forward", 32000, [measured], INTERPRETED)
        assert (found == chosen) if chosen else (search.launch_of(found, point, INTERPRETED) == other)


def test_a_launch_that_fails_is_not_chosen():
    point = Point("backward", 8192, 32000)
    [measured], _ = search.search([point], INTERPRETED, made_up, always)
    best = search.launch_of(BEST["backward", 32000], point, INTERPRETED)
    failed = Measured(point, measured.seconds | {best: "wrong: loss differs"})
    found = search.choose("backward", 32000, [failed], INTERPRETED)
    assert search.launch_of(found, point, INTERPRETED) != best
    assert not Measured(point, dict.fromkeys(measured.seconds, "no memory")).is_usable
    assert search.choose("backward", 32000, [], INTERPRETED) is None


def test_a_chip_that_keeps_rows_tunes_that_one_pass(tmp_path):
    """What the tuner writes for it is what the launcher takes, for plain aligned rows."""
    plain, best = ON_CHIP["plain"], {32000: Program(8, 32, tiles=2), 128256: Program(32, 8, tiles=2)}
    assert {point.operation for point in search.points(2**40, EMULATED)} == {"forward", "backward", "on_chip"}
    todo = [Point("on_chip", 8192, V) for V in best]

    def clock(point, own):
        wanted = search.launch_of(best[point.V], point, EMULATED)
        return 1e-6 * (1 + (own != wanted))

    for point in todo:  # the first that is tried is what is launched without a table
        first, *_ = search.candidates("on_chip", point.V, EMULATED)
        without = launch.on_chip_launch(8192, point.V, 2, True, plain, EMULATED)
        assert search.launch_of(first, point, EMULATED) == without
    found = tune.tuned(todo, EMULATED, clock, 1.0, ABOUT, now=lambda: 0.0)
    path = tmp_path / "tables.json"
    tune.write(path, "Chip", found["table"])
    chip = replace(EMULATED, table=tables.read(path)["Chip"])
    for point in todo:
        own = launch.on_chip_launch(8192, point.V, 2, True, plain, chip)
        assert own == search.launch_of(best[point.V], point, EMULATED)
        assert clock(point, own) == 1e-6
        chunks = best[point.V].thread_logits // 8
        assert (own.CHUNKS, own.piece.CHUNKS) == (chunks, best[point.V].tiles * chunks)
        assert own.num_warps * (own.programs // chip.multiprocessors) == best[point.V].num_warps
        assert own.registers * own.num_warps * 32 * (own.programs // chip.multiprocessors) <= launch.REGISTERS
        for other in (False, plain), (True, ON_CHIP["one"]):
            given = (8192, point.V, 2, *other)
            assert launch.on_chip_launch(*given, chip) == launch.on_chip_launch(*given, EMULATED)


def test_every_candidate_is_a_valid_step_of_a_table(tmp_path):
    for operation, V in itertools.product(tables.WARPS, search.VOCABULARIES):
        for program in search.candidates(operation, V, EMULATED):
            assert program.num_warps in tables.WARPS[operation]
            assert program.thread_logits in tables.THREAD_LOGITS


def test_points_that_do_not_fit_are_left_out():
    every = search.points(2**40, INTERPRETED)
    assert len(every) == 3 * len(search.ROWS) * len(search.VOCABULARIES)
    assert every[:3] == [Point(operation, 8192, 128256) for operation in ("forward", "backward", "one_pass")]
    assert max(2 * 2 * N * V for _, N, V in search.points(2**33, INTERPRETED)) <= 2**33
    assert {V for _, _, V in search.points(2**33, EMULATED)} == set(search.VOCABULARIES)


def test_a_faulty_entry_leaves_the_file_alone(tmp_path):
    path = tmp_path / "tables.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected"):
        tune.write(path, "Chip", {"reason": "nothing else"})
    assert path.read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device, and this one has one")
def test_without_a_device_it_says_so():
    with pytest.raises(SystemExit, match="measures on a CUDA device, and PyTorch finds none here"):
        tune.main([])


@pytest.fixture
def trials(triton_kernels):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the trials are on CPU tensors, for which kernels need Triton's interpreter")
    runs = []

    def timer(run):
        runs.append(run())
        return 1.0

    return SimpleNamespace(clock=Trials(torch.device("cpu"), timer), runs=runs)


@pytest.mark.parametrize("operation", ["forward", "backward", "one_pass"])
def test_trials_launch_what_they_are_asked_to(trials, monkeypatch, operation):
    """Runs kernels of a small shape in the interpreter. A launch with a wrong result is not timed."""
    point = Point(operation, 3, 3000)
    programs = [Program(8), Program(4, 8, tiles=1)]
    own = [search.launch_of(program, point, INTERPRETED) for program in programs]
    name = {"one_pass": "forward_backward"}.get(operation, operation)
    launched = []
    original = getattr(cross_entropy, name)

    def recorded(*arguments, launch=None, **keywords):
        launched.append(launch)
        return original(*arguments, launch=launch, **keywords)

    monkeypatch.setattr(cross_entropy, name, recorded)
    assert [trials.clock(point, each) for each in own] == [1.0, 1.0]
    assert [each for each in launched if each] == [own[0], own[0], own[1], own[1]]

    def wrong(*arguments, dx=None, **keywords):
        rows = recorded(*arguments, **keywords) if dx is None else recorded(*arguments, dx=dx, **keywords)
        if operation == "forward":
            rows[0][-1] += 0.01
        else:
            dx[0, -1, 7] += 0.01
        return rows

    monkeypatch.setattr(cross_entropy, name, wrong)
    assert trials.clock(point, own[1]).startswith("wrong: ")
    for error in (RuntimeError("no\nroom"), OutOfResources(65537, 65536, "registers")):
        monkeypatch.setattr(cross_entropy, name, mock.Mock(side_effect=error))
        assert trials.clock(point, own[1]).startswith(f"{type(error).__name__}: ")
    assert len(trials.runs) == 2
