"""The command line of fused_ignore_ce: see it at work, predict what a loss will cost, list what it runs on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from . import __version__
from .backends import choice as backends
from .core.options import budget_bytes, floating_dtype
from .tools import cost, demo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "demo":
        return demo.run(demo.Options(**{field.name: getattr(options, field.name) for field in fields(demo.Options)}))
    if options.command == "env":
        print(environment())
        return 0
    if options.command == "plan":
        return _plan(options, parser)
    parser.print_help()
    return 2


def _plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    classes, features = options.model_shape
    rate = None if options.tflops is None else cost.Rate(1e12 * options.tflops, "as given")
    try:
        print(
            cost.report(
                options.tokens, classes, features, ignored=options.ignored, dtype=options.dtype,
                device=options.device, memory_budget=options.memory_budget, rate=rate,
            )
        )  # fmt: skip
    except ValueError as e:  # no plan meets the budget
        parser.error(str(e))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_ignore_ce", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    command = commands.add_parser(
        "demo",
        help="train a small model with the plain and with the fused loss, and compare curves, time and memory",
        formatter_class=_Defaults,
    )
    sizes = {
        "steps": "training steps of each model",
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
    command.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="where it trains")
    command.add_argument(
        "--out", type=Path, metavar="PNG", default=demo.Options.out, help="picture of loss curves, time and memory"
    )
    command = commands.add_parser(
        "plan",
        help="predict memory and time of a model's loss from its sizes, without running it",
        formatter_class=_Defaults,
    )
    command.add_argument(
        "--model-shape",
        type=_shape,
        metavar="VxD",
        required=True,
        help="classes x features of the head, as in 128256x4096",
    )
    command.add_argument(
        "--tokens", type=_positive, metavar="N", required=True, help="tokens of a step, ignored ones included"
    )
    command.add_argument(
        "--ignored", type=_share, metavar="SHARE", default=0.0, help="share of the tokens that is ignored, from 0 to 1"
    )
    command.add_argument("--dtype", type=_dtype, metavar="DTYPE", default="bf16", help="dtype of the matrix products")
    command.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="device that the prediction is for; none is needed here",
    )
    command.add_argument(
        "--memory-budget", type=_bytes, metavar="BYTES", help="limit on scratch memory: 512MiB, 2GB, or bytes"
    )
    command.add_argument(
        "--tflops", type=float, metavar="X", help="rate of the matrix products in TFLOP/s, if you measured it"
    )
    commands.add_parser("env", help="print versions, devices, and each device's backend: what a bug report needs")
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option in its help, unless it is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected classes x features, as in 128256x4096, got {text}")
    return int(found[1]), int(found[2])


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return value


def _bytes(text: str) -> int | None:
    try:
        return budget_bytes(text)
    except TypeError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _dtype(text: str) -> torch.dtype:
    try:
        return floating_dtype("dtype", text)
    except TypeError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def environment() -> str:
    """Versions of what matters in a bug report, and the devices with the backend that "auto" chooses on each."""
    versions = {"fused_ignore_ce": __version__, "python": platform.python_version(), "torch": torch.__version__}
    packages = ("triton", "transformers", "accelerate", "peft", "trl", "liger-kernel")
    versions |= {name: _version(name) for name in packages}
    lines = [f"{name:<16} {version}" for name, version in versions.items()]
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    lines += [
        f"{name:<16} {text}; backend: {backends.choose('auto', torch.device(name))}" for name, text in devices.items()
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
