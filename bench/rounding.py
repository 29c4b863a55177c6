"""Measures what rounding logits to bfloat16 costs their log-probabilities, against float64 of the same operands.

    python -m bench.rounding [--tokens 128]

Hidden states and head are random, in bfloat16, with the sizes of heads of real models. They are scaled so that the
logits of a token have a given standard deviation over the vocabulary. Each token's target is drawn from its exact
distribution, as in reinforcement learning.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fused_ignore_ce import fused_linear_log_probs

#: (classes, features) of the heads of Mistral 7B v0.3, Llama 3.2 1B and Llama 3.1 8B.
HEADS = ((32768, 4096), (128256, 2048), (128256, 4096))
SPREADS = (2.0, 4.0)
TOKENS = 128


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """In float64, some classes at a time, as the head would take gigabytes."""
    return torch.cat([hidden.double() @ some.double().T for some in weight.split(8192)], -1)


def errors(classes: int, features: int, spread: float, tokens: int = TOKENS) -> dict[str, Any]:
    """Absolute errors of the targets' log-probabilities, with rounded and with unrounded logits."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, features, generator=random).bfloat16()
    weight = (torch.randn(classes, features, generator=random) * spread / features**0.5).bfloat16()
    log_probs = exact_logits(hidden, weight).log_softmax(-1)
    target = torch.multinomial(log_probs.exp(), 1, generator=random)
    true = log_probs.gather(-1, target).squeeze(-1)
    found = {"classes": classes, "features": features, "spread": spread, "log-probability": true.mean().item()}
    for name, dtype in (("rounded", None), ("unrounded", torch.float32)):
        ours = fused_linear_log_probs(hidden, weight, target.squeeze(-1), logits_dtype=dtype, backend="torch")
        error = (ours.double() - true).abs()
        found |= {f"{name}, median": error.median().item(), f"{name}, largest": error.max().item()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rounding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    tokens = parser.parse_args().tokens
    rows = [errors(*head, spread, tokens) for head in HEADS for spread in SPREADS]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1e"))


if __name__ == "__main__":
    main()
