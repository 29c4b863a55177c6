"""Every number and size may change between calls of a compiled function, whether shapes are dynamic or not."""

import pytest
import torch

from fused_ignore_ce import (
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
    fused_linear_log_probs,
)

X, H, W = torch.randn(2, 6, 9), torch.randn(2, 6, 4), torch.randn(9, 4)
Y = torch.tensor([[0, 1, 2, 3, -100, 4], [4, -100, 1, 2, 0, 3]])

NUMBERS = [1, 2, 0.5, 0.25]
IDS = [0, 1, 2]
SIZES = [3, 4, 5, 6]

LOSSES = {
    "logits": lambda **k: fused_cross_entropy(X[0] * 1, Y[0], **k),
    "linear": lambda **k: fused_linear_cross_entropy(H * 1, W, Y, **k),
    "causal": lambda **k: fused_causal_lm_loss(X * 1, Y, **k),
    "linear causal": lambda **k: fused_linear_causal_lm_loss(H * 1, W, Y, **k),
    "log-probabilities": lambda **k: fused_linear_log_probs(H * 1, W, Y, **k).sum(),
}
COUNTED = {"logits": "normalizer", "linear": "normalizer", "causal": "num_items_in_batch",
           "linear causal": "num_items_in_batch"}  # fmt: skip
CASES = {f"{loss} {name}": (loss, name) for loss, name in COUNTED.items()}
CASES |= {f"{loss} {name}": (loss, name) for loss in COUNTED for name in ("label_smoothing", "softcap", "z_loss")}
CASES |= {
    f"log-probabilities {name}": ("log-probabilities", name) for name in ("temperature", "logit_scale", "softcap")
}


def check(function, values, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for value in values:
        torch.testing.assert_close(compiled(value), function(value))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers(case):
    loss, name = LOSSES[case[0]], case[1]
    dynamic = True if name in ("z_loss", "temperature") else None  # Dynamo takes 5 s a case
    check(lambda number: loss(**{name: number}), NUMBERS[2:] if name == "label_smoothing" else NUMBERS, dynamic)


@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_ids(loss, dynamic):
    check(lambda ignored: LOSSES[loss](ignore_index=[-100, ignored]), IDS, dynamic)


SIZED = {
    "rows of logits": lambda n: fused_cross_entropy(X[0, :n] * 1, Y[0, :n]),
    "classes of logits": lambda n: fused_causal_lm_loss(X[..., : n + 3] * 1, Y, n + 3),
    "rows": lambda n: fused_linear_cross_entropy(H[:, :n] * 1, W, Y[:, :n]),
    "classes": lambda n: fused_linear_log_probs(H * 1, W[: n + 3], Y).sum(),
    "positions": lambda n: fused_linear_causal_lm_loss(H[:, :n] * 1, W, Y[:, :n]),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
@pytest.mark.parametrize("function", SIZED.values(), ids=SIZED)
def test_sizes(function, dynamic):
    check(function, SIZES, dynamic)
