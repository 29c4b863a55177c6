"""Errors help people who use other packages' names or orders of arguments: they say what to write here."""

import inspect

import pytest
import torch

import fused_ignore_ce
from fused_ignore_ce import (
    FusedCrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    fused_causal_lm_loss,
    fused_cross_entropy,
    fused_linear_causal_lm_loss,
    fused_linear_cross_entropy,
    fused_linear_log_probs,
    plan_linear_loss,
)
from fused_ignore_ce.core import unknown_keywords as keywords
from fused_ignore_ce.hf import patch_model

from ..helpers.hf_worker import llama

B, T, V, D = 2, 3, 7, 4
H, W, Y = torch.randn(B, T, D), torch.randn(V, D), torch.randint(0, V, (B, T))
X = (H @ W.T).flatten(0, 1)

CALLS = {
    "fused_cross_entropy": lambda **o: fused_cross_entropy(X, Y.flatten(), **o),
    "fused_linear_cross_entropy": lambda **o: fused_linear_cross_entropy(H, W, Y, **o),
    "fused_linear_log_probs": lambda **o: fused_linear_log_probs(H, W, Y, **o),
    "fused_causal_lm_loss": lambda **o: fused_causal_lm_loss(H @ W.T, Y, **o),
    "fused_linear_causal_lm_loss": lambda **o: fused_linear_causal_lm_loss(H, W, Y, **o),
    "FusedCrossEntropyLoss.__init__": FusedCrossEntropyLoss,
    "FusedLinearCrossEntropyLoss.__init__": lambda **o: FusedLinearCrossEntropyLoss(D, V, **o),
    "patch_model": lambda **o: patch_model(llama(num_hidden_layers=1), **o),
}
LOSSES = [name for name in CALLS if name not in ("fused_linear_log_probs",)]

#: (a keyword, functions that get it, what their errors must say).
MISTAKES = [
    ("lse_square_scale", LOSSES, "its name here is 'z_loss'"),
    ("logit_softcapping", CALLS, "its name here is 'softcap'"),
    ("soft_cap", CALLS, "its name here is 'softcap'"),
    ("ignore_idx", CALLS, "its name here is 'ignore_index'"),
    ("accum_dtype", CALLS, "sums are float32"),
    ("filter_eps", CALLS, "gradients are exact"),
    ("shift", CALLS, "fused_linear_causal_lm_loss"),
    ("lse", CALLS, "forward computes it"),
    ("label_smothing", LOSSES, "did you mean 'label_smoothing'"),
    ("logits_scaling", CALLS, "logit_scale=1 / logits_scaling"),
    ("chunk_size", ["fused_linear_cross_entropy", "FusedLinearCrossEntropyLoss.__init__"], "'memory_budget'"),
    ("chunk_size", ["fused_cross_entropy"], "logits that are there need no chunks"),
    ("bias", ["fused_linear_cross_entropy"], "'linear_bias'"),
    ("return_token_accuracy", ["fused_cross_entropy", "patch_model"], "'return_stats'"),
    ("num_items_in_batch", ["fused_cross_entropy", "fused_linear_cross_entropy"], "'normalizer'"),
    ("normalizer", ["fused_causal_lm_loss", "fused_linear_causal_lm_loss"], "'num_items_in_batch'"),
    ("token_weight", ["patch_model"], "F.cross_entropy.*reduction='none'"),
    ("token_weight", ["FusedCrossEntropyLoss.__init__"], "it belongs to one batch"),
    ("temperature", ["fused_cross_entropy"], "logit_scale=1 / temperature"),
    ("colour", [name for name in CALLS if name != "fused_causal_lm_loss"], "expected one of .*softcap"),
]


@pytest.mark.parametrize(
    ("keyword", "says"),
    [
        ("memory_budgets", "did you mean 'memory_budget'"),
        ("budget", "its name here is 'memory_budget'"),
        ("chunk_size", "its name here is 'memory_budget'"),
        ("ignored", "its name here is 'num_ignored'"),
        ("vocab_size", "its name here is 'num_classes'"),
        ("weight_dtyp", "did you mean 'weight_dtype'"),
        ("colour", "expected one of .*memory_budget"),
    ],
)
def test_unknown_keywords_of_the_planner(keyword, says):
    with pytest.raises(
        TypeError, match=rf"plan_linear_loss\(\) got an unexpected keyword argument '{keyword}'.*{says}"
    ):
        plan_linear_loss(8, V, D, **{keyword: 1})


@pytest.mark.parametrize(("keyword", "functions", "says"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_unknown_keywords(keyword, functions, says):
    for function in functions:
        with pytest.raises(TypeError, match=rf"{function}\(\) got an unexpected keyword argument '{keyword}'.*{says}"):
            CALLS[function](**{keyword: 0.1})


def test_arguments_of_a_module_s_call():
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'num_items_in_batch'.*'norma"):
        FusedCrossEntropyLoss()(X, Y.flatten(), num_items_in_batch=3)


def test_errors_name_options_that_exist():
    functions = [getattr(fused_ignore_ce, name) for name in fused_ignore_ce.__all__]
    parameters = {parameter for function in functions for parameter in inspect.signature(function).parameters}
    assert set(keywords._OTHER_NAMES) <= parameters


def test_compiled_calls_say_it_too():
    torch._dynamo.reset()
    torch.compile(lambda x: fused_cross_entropy(x, Y.flatten(), z_loss=0.1), backend="eager", fullgraph=True)(X)
    compiled = torch.compile(lambda x: fused_cross_entropy(x, Y.flatten(), lse_square_scale=0.1), backend="eager")
    with pytest.raises(TypeError, match="its name here is 'z_loss'"):
        compiled(X)


@pytest.mark.parametrize("labels", [Y, Y.flatten()], ids=["(B, T)", "flat"])
def test_logits_with_the_vocabulary_last(labels):
    with pytest.raises((ValueError, RuntimeError), match=r"vocabulary.*input.flatten\(0, -2\).*fused_causal_lm_loss"):
        fused_cross_entropy(H @ W.T, labels)
    expected = torch.nn.functional.cross_entropy(X, Y.flatten())
    torch.testing.assert_close(fused_cross_entropy((H @ W.T).flatten(0, -2), labels.flatten()), expected)


@pytest.mark.parametrize("options", [{}, {"linear_bias": torch.randn(V)}], ids=["", "bias"])
@pytest.mark.parametrize("flat", [False, True], ids=["(B, T, D)", "(N, D)"])
@pytest.mark.parametrize("function", [fused_linear_cross_entropy, fused_linear_log_probs], ids=lambda f: f.__name__)
def test_swapped_input_and_linear_weight(function, flat, options):
    h, y = (H.flatten(0, 1), Y.flatten()) if flat else (H, Y)
    with pytest.raises((ValueError, RuntimeError), match="input and linear_weight seem to be swapped: pass the hidden"):
        function(W, h, y, **options)


def test_other_mistakes_are_not_taken_for_these():
    with pytest.raises(ValueError, match=r"batch_size \(7\) to match target batch_size \(5\)$"):
        fused_linear_cross_entropy(W, X[:, :D], torch.zeros(5, dtype=torch.long))
    with pytest.raises(RuntimeError, match=r"got \(2, 5\)$"):
        fused_cross_entropy(H @ W.T, torch.zeros(2, 5, dtype=torch.long))


def test_a_transposed_linear_weight():
    with pytest.raises(
        RuntimeError, match=r"got 4 and 7, respectively; linear_weight has them first: pass linear_weig"
    ):
        fused_linear_cross_entropy(H, W.T, Y)


def test_numbers_in_the_place_of_tensors():
    """In flash-attention's function, label_smoothing is the third argument; here the third is `weight`."""
    with pytest.raises(TypeError, match="weight: expected a Tensor, got float"):
        fused_cross_entropy(X, Y.flatten(), 0.1)
    with pytest.raises(TypeError, match="linear_bias: expected a Tensor, got bool"):
        fused_linear_cross_entropy(H, W, Y, linear_bias=True)
