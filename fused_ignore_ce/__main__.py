"""`python -m fused_ignore_ce demo` shows the library at work; `env` shows what it runs on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from . import __version__, demo
from .arguments import choose_backend


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "demo":
        return demo.run(demo.Options(**{field.name: getattr(options, field.name) for field in fields(demo.Options)}))
    if options.command == "env":
        print(environment())
        return 0
    parser.print_help()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_ignore_ce", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("env", help="print versions, devices and the backend that each device gets")
    command = commands.add_parser(
        "demo",
        help="train a small model with the plain and with the fused loss, and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sizes = {
        "steps": "training steps of each run",
        "batch": "functions per step",
        "length": "tokens per function, cut or padded",
        "vocab": "tokens in the vocabulary, at most",
        "hidden": "width of the model",
        "functions": "functions that the tokenizer is trained on and the steps are drawn from",
    }
    for name, text in sizes.items():
        command.add_argument(f"--{name}", type=_positive, metavar="N", default=getattr(demo.Options, name), help=text)
    command.add_argument("--seed", type=int, metavar="N", default=demo.Options.seed, help="seed of data and weights")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=default_device, help="cpu or cuda")
    command.add_argument("--out", type=Path, metavar="PNG", default=demo.Options.out, help="picture of the curves")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def environment() -> str:
    """Versions, and the devices with the backend that "auto" chooses on each."""
    versions = {"fused_ignore_ce": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("triton", "transformers")}
    lines = [f"{name:<16} {version}" for name, version in versions.items()]
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    lines += [
        f"{name:<16} {text}; backend: {choose_backend('auto', torch.device(name))}" for name, text in devices.items()
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
