"""The demo trains two models, compares them, and fails if they differ."""

import contextlib
import functools
import io
import re
import sys

import pytest
import torch

from fused_ignore_ce.__main__ import main
from fused_ignore_ce.tools import demo, demo_data

STEPS, BATCH, LENGTH = 12, 2, 64
SIZES = {"steps": STEPS, "batch": BATCH, "length": LENGTH, "vocab": 500, "hidden": 16, "functions": 200}

SOURCE = '''
class C:
    @property
    def documented(self):
        """Says\x0cwhat."""
        if self:
            return 1
        return 2

    def bare(
        self,
    ):
        return 3

async def decorated_first():
    @cache
    def inner(): return 4

def only_documented():
    """Nothing to learn here."""

def one_line(): return 5
'''


def run_demo(out, **changed):
    """(exit status, printed lines) of a small demo."""
    options = [f"--{name}={value}" for name, value in {**SIZES, "device": "cpu", "out": out, **changed}.items()]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["demo", *options])
    return status, printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("demo") / "curves.png"
    return *run_demo(out), out


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    return demo_data.train_tokenizer(list(demo_data.split_functions(SOURCE)), 300)


def cells(lines, run):
    """The table's row of a run, without the name."""
    return next(words[1:] for words in map(str.split, lines) if words[:1] == [run] and words[1][0].isdigit())


def test_curves_coincide_and_status_is_zero(result):
    status, lines, _ = result
    assert status == 0
    assert lines[-1].endswith(f"within {demo.TOLERANCE}")
    difference = float(lines[-1].rsplit(":", 1)[1].split()[0])
    assert difference < 1e-4  # 12 steps amplify little
    plain, fused = cells(lines, "plain"), cells(lines, "fused")
    assert float(plain[0]) == pytest.approx(float(fused[0]), abs=2e-4)
    assert float(plain[0]) < 6.3  # log(500) = 6.21 and more before the first step


def test_the_logits_were_not_there(result):
    _, lines, _ = result
    share = int(re.search(r"tokens, (\d+)% of them ignored", lines[0])[1])
    tokens, ignored = re.search(rf"^fused: cross_entropy: {STEPS} calls, (\d+) tokens, (\d+) of them ignored$",
                                "\n".join(lines), re.M).groups()  # fmt: skip
    assert int(tokens) == STEPS * BATCH * LENGTH
    assert share == round(100 * int(ignored) / int(tokens))
    assert 0 < share < 100  # every function has a prompt, and something to learn
    assert "logits read: never" in lines


def test_table_has_costs_and_ratios(result):
    _, lines, _ = result
    header = next(line for line in lines if line.lstrip().startswith("run "))
    assert header.split("  ")[-2:] == ["ms/step", "peak MiB"]
    for run in ("plain", "fused"):
        assert float(cells(lines, run)[2]) > 0
        assert (cells(lines, run)[3] != "n/a") == (sys.platform == "linux")
    *_, time, _ = next(
        line for line in lines if line.lstrip().startswith("plain / fused  ") and "the" not in line
    ).split()
    assert float(time) > 0


def fake_runs(monkeypatch, seconds=((), ()), peaks=((), ())):
    monkeypatch.setattr(demo.Run, "__post_init__", lambda self: None)
    return [
        demo.Run(name, None, [7.0, 6.0], list(s), list(p))
        for name, s, p in zip(("plain", "fused"), seconds, peaks, strict=True)
    ]


def test_noise_that_meets_both_runs_alike_does_not_decide(monkeypatch):
    """The machine is ten times as slow in some steps, in one of them for the fused model only."""
    times = [2.0, 20.0, 20.0, 2.0, 2.0], [1.0, 10.0, 10.0, 10.0, 1.0]
    plain, fused = fake_runs(monkeypatch, times, ([3 << 20, 6 << 20], [2 << 20]))
    assert demo.ratios(plain, fused) == (2.0, 3.0)
    assert demo.costs(plain) == (2000.0, 6.0)
    assert demo.quartiles([0.4, 0.1, 0.2, 0.3, 0.5]) == pytest.approx((200, 400))
    assert demo.table(plain, fused).splitlines()[-1].split() == ["plain", "/", "fused", "2.00", "3.00"]


def test_what_was_not_measured_is_not_a_number(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plain, fused = fake_runs(monkeypatch)
    assert demo.table(plain, fused).splitlines()[-1].split() == ["plain", "/", "fused", "n/a", "n/a"]
    demo.draw(plain, fused, "nothing", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


def test_the_two_take_turns_in_alternating_order(monkeypatch):
    pytest.importorskip("tqdm")
    plain, fused = fake_runs(monkeypatch)
    turns = []
    monkeypatch.setattr(
        demo.Run, "step", lambda run, ids, labels, measure_memory: turns.append((run.name, measure_memory))
    )
    demo.train_in_turns(plain, fused, [(None, None)] * 11)
    assert [name for name, _ in turns] == ["plain", "fused", "fused", "plain"] * 5 + ["plain", "fused"]
    assert [step // 2 + 1 for step, (_, memory) in enumerate(turns) if memory] == [10, 10, 11, 11]


def test_picture_has_curves_time_and_memory(result):
    _, lines, out = result
    assert out.read_bytes().startswith(b"\x89PNG")
    assert any(str(out) in line for line in lines)


def test_another_loss_fails_the_gate(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "patch_model", functools.partial(demo.patch_model, z_loss=0.1))
    status, lines = run_demo(tmp_path / "curves.png", steps=2)
    assert status == 1
    assert lines[-1].endswith(f"ABOVE {demo.TOLERANCE}")


def test_nan_fails_the_gate(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    patch_model = demo.patch_model

    def patched(model):
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        return patch_model(model)

    monkeypatch.setattr(demo, "patch_model", patched)
    status, _ = run_demo(tmp_path / "curves.png", steps=1)
    assert status == 1


def test_missing_packages_are_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else object())
    with pytest.raises(
        SystemExit, match=r"tqdm: needed by the demo and not installed; pip install 'fused_ignore_ce\[demo\]'"
    ):
        demo.run(demo.Options())


def test_functions_split_into_prompt_and_body():
    examples = sorted(demo_data.split_functions(SOURCE))
    assert examples == [
        ("async def decorated_first():\n", "    @cache\n    def inner(): return 4\n"),
        ("def bare(\n    self,\n):\n", "    return 3\n"),
        (
            'def documented(self):\n    """Says\x0cwhat."""\n',
            "    if self:\n        return 1\n    return 2\n",
        ),
    ]


@pytest.mark.parametrize(
    "length_of",
    [lambda p, b: p + b + 5, lambda p, b: p + b, lambda p, b: p + 1, lambda p, b: p - 1],
    ids=["padded", "exact", "cut-in-body", "cut-in-prompt"],
)
def test_labels_are_ignored_on_prompt_and_padding_only(tokenizer, length_of):
    for example in demo_data.split_functions(SOURCE):
        prompt = tokenizer.encode(example.prompt).ids
        body = [*tokenizer.encode(example.body).ids, demo_data.END]
        length = length_of(len(prompt), len(body))
        padding = max(0, length - len(prompt) - len(body))
        ids, labels = demo_data.encode(tokenizer, example, length)
        assert labels == ([-100] * len(prompt) + body + [-100] * padding)[:length]
        assert ids == (prompt + body + [demo_data.END] * padding)[:length]


def test_source_survives_the_tokenizer(tokenizer):
    for example in demo_data.split_functions(SOURCE):
        assert tokenizer.decode(tokenizer.encode(example.prompt).ids) == example.prompt
