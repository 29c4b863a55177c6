"""Every example runs as a user would run it, and learns."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.paths import ROOT

EXAMPLES = ROOT / "examples"
NEEDS = {
    "bare_loop": ["tokenizers"],
    "trainer": ["tokenizers", "accelerate"],
    "domains": ["tokenizers", "accelerate"],
    "lora": ["tokenizers", "accelerate", "peft"],
    "sft": ["tokenizers", "trl"],
    "dpo": ["tokenizers", "trl"],
    "grpo": ["tokenizers", "trl"],
    "tensor_parallel": ["tokenizers"],
    "fsdp2": ["tokenizers"],
}
#: What the examples import from each other.
SHARED = ["data", "models"]
#: How the examples that need several processes are started.
TORCHRUN = {name: ["--standalone", "--nproc-per-node", "2"] for name in ("tensor_parallel", "fsdp2")}
LOSS = r"(?<!train_)(?<!eval_)loss\W+(-?\d+\.\d+)"
DOMAIN = r"'loss of ([a-z ]+)': '?(\d+\.\d+)"
REWARD = r"rewards/lower_case/mean\W+(\d+\.\d+)"


def command(name):
    return " ".join(["torchrun", *TORCHRUN[name], ""] if name in TORCHRUN else ["python", ""]) + f"examples/{name}.py"


def test_all_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, *SHARED}


@pytest.mark.parametrize("name", [*NEEDS, *SHARED])
def test_example_is_short_and_says_how_it_is_run(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    if name in NEEDS:
        assert f"\nRun it by `{command(name)} [--model NAME] [--steps N]`.\n" in text
        assert (EXAMPLES / "README.md").read_text().count(f"`{command(name)}` |\n") == 1


def run(name, folder, *options):
    """What an example prints."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example needs {package}, which is not installed")
    launcher = ["-m", "torch.distributed.run", *TORCHRUN[name]] if name in TORCHRUN else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not a prefix" not in done.stderr  # TRL warns so where a token spans prompt and completion
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path):
    printed = run(name, tmp_path, "--steps", "40" if name == "grpo" else "10")
    if name == "grpo":  # its loss does not measure what was learnt
        rewards = [float(reward) for reward in re.findall(REWARD, printed)]
        assert len(rewards) == 10
        assert rewards[-1] > rewards[0] + 0.1, rewards
    else:
        losses = [float(loss) for loss in re.findall(LOSS, printed)]
        assert len(losses) >= 3, printed
        assert losses[-1] < losses[0] - 0.3, losses
    if name == "trainer":
        assert 0 < float(re.search(r"eval_accuracy\W+(\d\.\d+)", printed)[1]) < 1
        assert re.search(r"^fused: argmax\(logits\): [1-9]", printed, re.M)
    if name == "domains":
        assert {domain for domain, _ in re.findall(DOMAIN, printed)} == {"functions", "methods", "private methods"}
        assert all(4 < float(loss) < 10 for _, loss in re.findall(DOMAIN, printed))
    assert re.search(r"^fused: [^:]+: [1-9]\d* calls?, [1-9]\d* tokens, [1-9]\d* of them ignored$", printed, re.M)
    assert "\nlogits read: never\nlogits not allocated: " in printed, printed


def test_a_model_by_its_name(tmp_path):
    """The tokenizer has no padding token, as is common. The first loss shows the vocabulary, and so the model."""
    pytest.importorskip("tokenizers")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source, folder = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([Path(__file__).read_text()], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(source)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(source)
    printed = run("bare_loop", folder, "--steps", "1", "--model", str(source))
    first = re.search(LOSS, printed)
    assert float(first[1]) == pytest.approx(math.log(300), abs=0.1)
    assert "\nlogits read: never\nlogits not allocated: " in printed, printed
