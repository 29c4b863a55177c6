"""Random forwards that are compiled after their model was patched, compared with the plain model, not compiled.

python -m tests.deferred.traced_programs [--programs 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .fuzz.models import B, D, T, Tiny, V, patched

#: Statements of a forward; {a} and {b} are logits that it has, {new} becomes one. Operators stand beside the methods
#: that do the same, since the compiler sees them differently.
STATEMENTS = """
{new} = {a} * 2.0
{new} = {a} + bias
{new} = bias - {a}
{new} = {a} / scale
{new} = torch.add({a}, bias)
{new} = {a} - 0.5 * {b}
{new} = {a} * {b}
{new} = {a}.float()
{new} = {a}[:, :]
{new} = {a}.view(-1, V).view(B, T, V)
{new} = {a}.transpose(1, 2).transpose(1, 2)
{new} = {a}.clone()
{new} = {a}.detach()
{new} = torch.tanh({a})
{new} = {a}.log_softmax(-1)
{new} = {a} + {b}.mean()
{new} = torch.where({a} > 0, {a}, {b})
with torch.no_grad(): {new} = {a} * 3
{a} += 1.5
{a} += bias
{a} -= {b}
{a} *= scale
{a} /= scale
{a}.mul_(0.5)
{a}.add_(bias)
{a}[:, 0] = 1.0
{a}[..., 0] += bias[0]
{a}[:, 1:].mul_(scale)
{a}.view(-1, V).div_(2)
{a}.masked_fill_({a} > 0.5, -1.0)
with torch.no_grad(): {a}.mul_(2)
bias.add_(1)
torch._dynamo.graph_break()
""".strip().splitlines()


def drawn(seed: int) -> str:
    """The source of a random forward: three to six statements, and a sum of up to three of their logits."""
    choice = random.Random(seed).choice
    names, lines = ["x"], []
    for i in range(choice((3, 4, 5, 6))):
        statement = choice(STATEMENTS)
        lines.append(statement.format(a=choice(names), b=choice(names), new=f"x{i}"))
        if "{new}" in statement:
            names.append(f"x{i}")
    result = " + ".join(choice(names) for _ in range(choice((1, 2, 3))))
    return "\n    ".join(["def after(x):", "bias, scale = BIAS.clone(), SCALE.clone()", *lines, f"return {result}\n"])


def forward_of(source: str) -> Callable[[Tensor], Tensor]:
    names: dict[str, Any] = {
        "torch": torch,
        "B": B,
        "T": T,
        "V": V,
        "BIAS": torch.linspace(-1, 1, V),
        "SCALE": torch.linspace(1, 2, V),
    }
    exec(compile(source, "<forward>", "exec"), names)
    after: Callable[[Tensor], Tensor] = names["after"]
    return after


def fault(after: Callable[[Tensor], Tensor]) -> str | None:
    """What is wrong when `after` ends the forward of a model that is patched and compiled, or None.

    Where the plain model raises, nothing is compared: it may have saved values which ours computes again.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Tiny(nn.Linear(D, V, bias=False), after)
    ours = patched(copy.deepcopy(plain))
    ours.forward = torch.compile(ours.forward, backend="eager")
    expected, found = _seen(plain), _seen(ours)
    if isinstance(expected, Exception):
        return None
    if isinstance(found, Exception):
        return f"raised {found!r}"
    for name, mine, true in zip(("loss", "logits", *dict(plain.named_parameters())), found, expected, strict=True):
        try:
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5, equal_nan=True)
        except AssertionError as error:
            return f"{name}: {error}"
    return None


def _seen(model: nn.Module) -> tuple[Tensor | None, ...] | Exception:
    ids = torch.arange(B * T).view(B, T) % V
    try:
        output = model(ids, labels=ids)
        values = output.logits.detach() * 1
        if output.loss.requires_grad:
            output.loss.backward()
    except Exception as error:
        return error
    return (output.loss.detach(), values, *[p.grad for p in model.parameters()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = 0
    for seed in range(arguments.seed, arguments.seed + arguments.programs):
        source = drawn(seed)
        if what := fault(forward_of(source)):
            faults += 1
            print(f"seed {seed}\n{source}{what}\n", flush=True)
    print(f"{arguments.programs} programs, {faults} with a fault")
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
