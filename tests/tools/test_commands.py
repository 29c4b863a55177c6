"""The command line: `env` says what this machine runs, and wrong arguments are errors."""

import importlib.util
import sys

import pytest
import torch

import fused_ignore_ce
from fused_ignore_ce.__main__ import main


def test_env_names_versions_and_backend(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fused_ignore_ce"] == fused_ignore_ce.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["torch"] == torch.__version__
    for package in ("triton", "transformers", "accelerate", "peft", "trl", "liger-kernel"):
        known = importlib.util.find_spec(package.replace("-", "_")) is not None
        assert (lines[package] != "not installed") == known
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
