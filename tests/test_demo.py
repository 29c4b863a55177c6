"""The command line: the demo trains, compares and can fail; `env` says what this machine runs."""

import contextlib
import functools
import io
import sys

import pytest
import torch

import fused_ignore_ce
from fused_ignore_ce import demo
from fused_ignore_ce.__main__ import main
from fused_ignore_ce.measure import PeakMemory

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
    return demo.train_tokenizer(list(demo.split_functions(SOURCE)), 300)


def cells(lines, run):
    """The table's row of a run, without the name."""
    return next(words[1:] for words in map(str.split, lines) if words[:1] == [run])


def test_curves_coincide_and_status_is_zero(result):
    status, lines, _ = result
    assert status == 0
    assert lines[-1].endswith(f"within {demo.TOLERANCE}")
    difference = float(lines[-1].rsplit(":", 1)[1].split()[0])
    assert difference < 1e-4  # 12 steps amplify little


def test_table_counts_every_position_once_and_equally(result):
    _, lines, _ = result
    plain, fused = cells(lines, "plain"), cells(lines, "fused")
    kept, ignored = int(plain[2]), int(plain[3])
    assert plain[2:4] == fused[2:4]
    assert kept + ignored == STEPS * BATCH * LENGTH
    assert kept >= STEPS * BATCH  # every function has something to learn
    assert ignored >= STEPS * BATCH  # and a prompt


def test_table_has_costs_and_ratios(result):
    _, lines, _ = result
    header = next(line for line in lines if line.lstrip().startswith("run "))
    assert header.split("  ")[-3:] == ["loss s", "ms/step", "peak MiB"]
    ms = [float(cells(lines, run)[5]) for run in ("plain", "fused")]
    assert min(ms) > 0
    for run in ("plain", "fused"):
        assert (cells(lines, run)[6] != "n/a") == (sys.platform == "linux")
    *_, ratio, _ = next(line for line in lines if line.startswith("plain / fused")).split()
    assert float(ratio) == pytest.approx(ms[0] / ms[1], rel=0.1)  # of rounded numbers


def test_picture_is_a_png(result):
    _, _, out = result
    assert out.read_bytes().startswith(b"\x89PNG")


def test_another_loss_fails_the_gate(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    other = functools.partial(demo.fused_causal_lm_loss, z_loss=0.1)
    monkeypatch.setattr(demo, "fused_causal_lm_loss", other)
    status, lines = run_demo(tmp_path / "curves.png", steps=2)
    assert status == 1
    assert lines[-1].endswith(f"ABOVE {demo.TOLERANCE}")


def test_nan_fails_the_gate(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "fused_causal_lm_loss", lambda logits, **_: logits.sum() * torch.nan)
    status, _ = run_demo(tmp_path / "curves.png", steps=1)
    assert status == 1


def test_missing_packages_are_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "tqdm" else object())
    with pytest.raises(SystemExit, match=r"needs tqdm: pip install 'fused_ignore_ce\[demo\]'"):
        demo.run(demo.Options())


def test_functions_split_into_prompt_and_body():
    examples = sorted(demo.split_functions(SOURCE))
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
    for example in demo.split_functions(SOURCE):
        prompt = tokenizer.encode(example.prompt).ids
        body = [*tokenizer.encode(example.body).ids, demo.END]
        length = length_of(len(prompt), len(body))
        padding = max(0, length - len(prompt) - len(body))
        ids, labels = demo.encode(tokenizer, example, length)
        assert labels == ([-100] * len(prompt) + body + [-100] * padding)[:length]
        assert ids == (prompt + body + [demo.END] * padding)[:length]


def test_source_survives_the_tokenizer(tokenizer):
    for example in demo.split_functions(SOURCE):
        assert tokenizer.decode(tokenizer.encode(example.prompt).ids) == example.prompt


def test_env_names_versions_and_backend(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fused_ignore_ce"] == fused_ignore_ce.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["torch"] == torch.__version__
    assert {"triton", "transformers"} <= lines.keys()
    assert lines["cpu"].endswith("backend: torch")
    assert ("cuda:0" in lines) == torch.cuda.is_available()


def test_no_command_prints_help(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "env" in printed


@pytest.mark.parametrize("arguments", [["train"], ["demo", "--steps=0"], ["demo", "--step", "x"]], ids=" ".join)
def test_wrong_arguments_are_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")
@pytest.mark.parametrize("mib", [24, 96], ids=["heap", "mapped"])  # below and above what glibc may keep
def test_peak_memory_counts_reused_memory_too(mib):
    pins = []  # keep what is freed below them from being the heap's end, which glibc returns on its own
    for _ in range(8):
        with PeakMemory(torch.device("cpu")) as peak:
            both = [torch.ones(mib << 18), torch.ones(mib << 18)]
            pins.append(torch.ones(1 << 16))
            del both
    assert peak.bytes == pytest.approx(2 * mib << 20, abs=8 << 20)


def test_peak_memory_is_none_on_devices_it_does_not_know():
    with PeakMemory(torch.device("meta")) as peak:
        torch.ones(9, device="meta")
    assert peak.bytes is None
