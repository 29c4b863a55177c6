"""The bench's arithmetic on numbers that a reader can check by hand. Nothing is timed."""

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("pytest_benchmark")

from bench.machine import slug
from bench.speed import scaling, side_by_side, workload
from bench.speed.side_by_side import ROOF, Turn, in_turns, least_work, roof_work, row, turn_of
from bench.speed.workload import DIRECTIONS, MODELS, SHARES, Case, Limits, cases, tensors

CPU = torch.device("cpu")
LOGITS = Case("base", "logits", 8, 100, 0, 0.75, "bfloat16", "both")
LINEAR = Case("base", "linear", 8, 100, 10, 0.75, "bfloat16", "both")


def test_least_work_by_hand():
    """2 of 8 rows are kept. There are 100 classes of 2 bytes, and 10 features."""
    assert [least_work(LOGITS._replace(direction=d)) for d in DIRECTIONS] == [(2 + 2 + 8) * 200, 2 * 200, (2 + 8) * 200]
    assert [least_work(LINEAR._replace(direction=d)) for d in DIRECTIONS] == [6 * 2000, 2 * 2000, 4 * 2000]
    assert roof_work(LOGITS) == 2 * 8 * 200
    assert roof_work(LINEAR) == least_work(LINEAR)


@pytest.mark.parametrize(("case", "unit"), [(LOGITS, 1e9), (LINEAR, 1e12)], ids=["logits", "linear"])
def test_a_row_by_hand(case, unit):
    baseline, *_, ours = side_by_side.PROVIDERS[case.kind]
    seconds = {baseline.name: [4.0, 4.0, 8.0], ours.name: [1.0, 2.0, 9.0], ROOF: [0.5, 0.5, 0.5]}
    found = row(case, ours, seconds)
    assert found["ms"]["p50"] == 2000
    assert found["ratio"] == 0.5
    assert found["rate"] == pytest.approx(least_work(case) / 2 / unit)
    assert found["share_of_roof"] == pytest.approx(found["rate"] / (roof_work(case) / 0.5 / unit))
    assert found["rounds"] == 3
    interpolated = row(case, ours, seconds | {ours.name: [4.0, 1.0, 2.0, 3.0, 5.0]})["ms"]
    assert interpolated == pytest.approx({"p20": 1800, "p50": 3000, "p80": 4200})
    assert set(row(case, ours, seconds | {ours.name: [7.0, 7.0]})["ms"].values()) == {7000}
    assert "ratio" not in row(case, ours, seconds | {baseline.name: "out of memory"})


class Benchmark:
    """Stands for pytest-benchmark's fixture. It calls its target, and the n-th round takes n seconds."""

    def pedantic(self, target, setup, rounds):
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        for number in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(float(number))


def test_turns_alternate_and_errors_stay_with_their_loss():
    order = []

    def fail(_):
        raise RuntimeError("no\nmemory")

    turns = {name: Turn(lambda name=name: name, order.append) for name in "ab"} | {"c": Turn(lambda: None, fail)}
    found = in_turns(turns, CPU, Benchmark(), compiles=False)
    assert found["c"] == "RuntimeError: no memory"
    rounds = side_by_side.ROUNDS[1]
    assert found["a"] == [2.0 * i for i in range(rounds)]
    assert found["b"] == [2.0 * i + 1 for i in range(rounds)]
    assert "".join(order) == "ab" * (rounds + 1)  # the first round warms up and is not timed


@pytest.mark.parametrize("compiles", [False, True])
def test_slow_turns_get_the_least_rounds(monkeypatch, compiles):
    """The clock says that a round takes an hour. Where that may be due to compilation, a second one is tried."""
    monkeypatch.setattr(side_by_side, "synchronized_clock", itertools.count(0, 3600).__next__)
    runs = []
    found = in_turns({"a": Turn(lambda: None, runs.append)}, CPU, Benchmark(), compiles)
    assert len(found["a"]) == side_by_side.ROUNDS[0]
    assert len(runs) == 1 + compiles + side_by_side.ROUNDS[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_overwritten_is_restored_before_every_turn(direction):
    x, target = tensors(LOGITS._replace(direction=direction, dtype="float32"), CPU)
    original, seen = x.detach().clone(), []

    def loss(x, target):
        seen.append(x.detach().clone())
        total = x.sum()
        x.data.zero_()
        return total

    turn = turn_of(loss, LOGITS._replace(direction=direction), [x], target, original)
    for _ in range(2):
        turn.run(turn.prepare())
    assert len(seen) == 2
    assert all(torch.equal(x, original) for x in seen)


def test_the_most_tokens_that_fit():
    within = Limits(tokens=1000, logits=10_000, products=400_000, bytes=10**6)
    assert within.tokens_for(V=100, D=0) == 64  # 128 would be 12800 logits
    assert within.tokens_for(V=100, D=100) == 32  # 64 would be 640000 multiply-adds
    assert within.tokens_for(V=1, D=0) == 512
    assert within._replace(bytes=16 * 3200).tokens_for(V=100, D=0) == 32
    assert within.tokens_for(V=20_000, D=0) == 0


def test_every_model_share_and_direction_has_its_case():
    every = cases(CPU)
    assert len(every) == len(set(every))
    linear = {(c.V, c.D, c.ignored, c.direction) for c in every if c.kind == "linear"}
    logits = {(c.V, c.ignored, c.direction) for c in every if c.kind == "logits"}
    for (V, D), share, direction in itertools.product(MODELS.values(), SHARES, DIRECTIONS):
        assert (V, D, share, direction) in linear
        assert (V, share, direction) in logits


def test_training_steps_are_measured_where_there_is_a_gpu(monkeypatch):
    """On a GPU, models' vocabularies are measured, and the loss of logits early on. They are not on a CPU."""
    monkeypatch.setattr(workload, "limits", lambda device: Limits(8192, 2**33, 2**43, 2**36))
    every = cases(torch.device("cuda"))
    training = [case for case in every if case.shape == "training"]
    assert {(c.N, c.V) for c in training} == set(itertools.product((8192, 16384), (32000, 128256, 151936, 248320)))
    assert {c.kind for c in training} == {"logits", "linear"}
    early = every[: every.index(next(case for case in every if case.shape in ("N", "V", "D")))]
    for N, V, direction in itertools.product((8192, 16384), (32000, 128256, 151936, 248320), DIRECTIONS):
        assert any((c.N, c.V, c.direction, c.ignored) == (N, V, direction, 0.0) for c in early if c.kind == "logits")
    assert not [case for case in cases(CPU) if case.shape == "training"]


def test_tensors_are_what_the_case_says():
    h, w, target = tensors(LINEAR, CPU)
    assert (h.shape, w.shape, target.shape) == ((8, 10), (100, 10), (8,))
    assert h.dtype == w.dtype == torch.bfloat16
    assert int((target == -100).sum()) == 8 - LINEAR.kept == 6


def fake(kind, shape, N=1024, V=32768, D=1024, ignored=0.0, ms=1.0, **more):
    ours = side_by_side.PROVIDERS[kind][-1].name
    sizes = {"N": N, "V": V, "D": D if kind == "linear" else 0, "ignored": ignored}
    times = {"ms": {"p50": ms}, "rate": 1.0, "roof": 2.0}
    return (
        {"kind": kind, "shape": shape, "dtype": "bfloat16", "direction": "both", "provider": ours}
        | sizes
        | times
        | more
    )


def test_fits_find_the_exponents_that_were_put_in():
    """Time grows like N, like V^1.5 and like the share of kept tokens. Rows of other kinds change nothing."""
    rows = [fake("linear", "base", ms=8.0)]
    rows += [fake("linear", "N", N=1024 * k, ms=8.0 * k) for k in (0.5, 2)]
    rows += [fake("linear", "V", V=32768 * k, ms=8.0 * k**1.5) for k in (0.5, 2)]
    rows += [fake("linear", "base", ignored=i, ms=8 * (1 - i)) for i in (0.5, 0.75)]
    rows += [fake("linear", "base", direction="forward", ms=1e6), fake("linear", "base", dtype="float32", ms=1e6)]
    found = {fit["varied"]: fit for fit in scaling.fits(rows)}
    assert {varied: round(fit["exponent"], 9) for varied, fit in found.items()} == {"N": 1.0, "V": 1.5, "kept": 1.0}
    assert (found["N"]["from"], found["N"]["to"], found["N"]["points"]) == (512, 2048, 3)
    [constant] = scaling.fits([fake("logits", "N", N=N, ms=5) for N in (2, 4, 8)])
    assert constant["exponent"] == pytest.approx(0)


def test_names_of_files():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R) Processor") == "intel-xeon-processor"
