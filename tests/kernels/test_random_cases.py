"""PyTorch's own samples, and random cases that share compiled kernels: `python -m tests.architectures` executes them.

The configuration of a test follows from its number, so that all of its cases run the same kernels. Where kernels are
interpreted, `test_properties` and `test_any_combination` draw configurations, too.
"""

import os
import random
import sys
import types
import unittest

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_ignore_ce import fused_cross_entropy, fused_linear_cross_entropy
from fused_ignore_ce.backends import reference
from fused_ignore_ce.linear import calls
from fused_ignore_ce.linear.plan import LinearPlan

from ..helpers import drawing
from ..helpers.linear import gradients, problem
from ..losses.test_properties import CALLS, DISTILLATIONS, call, distilled, finite_or_1, gradient, truth

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="test_properties draws for the interpreter"
)

#: Cases of a configuration.
CASES = 10

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOGITS = ["fused_cross_entropy", "fused_cross_entropy, gradient in forward", "fused_distillation_loss"]
HIDDEN = ["fused_linear_cross_entropy", "fused_linear_log_probs", "fused_linear_distillation_loss"]
SETTINGS = settings(drawing.SETTINGS, max_examples=CASES)


@pytest.fixture(params=["triton"])
def backend(request):
    return request.param


def samples(dtype, device):
    """What PyTorch tests its own cross entropy with. Its module imports a package that these samples do not need."""
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False))
    from torch.testing._internal.common_methods_invocations import op_db

    [op] = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    return list(op.sample_inputs(device, dtype, requires_grad=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_samples_of_pytorch(dtype, backend, device, no_worse):
    found = samples(dtype, device)
    assert len(found) >= 20
    for sample in found:
        y, weight = sample.args[0], sample.kwargs.get("weight")
        floating = y.is_floating_point()

        def loss(function, x, q=None, sample=sample, y=y, weight=weight, **extra):
            options = sample.kwargs | ({} if weight is None else {"weight": weight.to(x.dtype)}) | extra
            return function(x, y if q is None else q, **options)

        tensors = [sample.input, y] if floating else [sample.input]
        three = (
            gradients(lambda *leaves: loss(fused_cross_entropy, *leaves, backend=backend), tensors),
            gradients(lambda *leaves: loss(F.cross_entropy, *leaves), tensors),
            gradients(lambda *leaves: loss(F.cross_entropy, *leaves), [t.double() for t in tensors]),
        )
        for name, *results in zip(("loss", "dx", "dprobs"), *three, strict=False):
            no_worse(f"{name} of {sample}", *results, terms=sample.input.numel(), logits=9.0, scale=1.5)


@pytest.mark.parametrize("number", range(18))
def test_numbers_of_any_size(number, backend, device):
    """Magnitudes up to the largest finite number, masked classes, upstream gradients that are infinite or NaN."""
    rng = random.Random(number)
    name, dtype = (LOGITS + HIDDEN)[number % 6], DTYPES[number // 6]
    N, V = rng.choice([1, 3, 5]), rng.choice([2, 40, 300] if name in HIDDEN else [1, 40, 1000, 5003])
    softcap, reduction = rng.choice([None, 30.0]), rng.choice(["mean", "sum", "none"])
    options = {"softcap": softcap, "reduction": reduction}
    distils, layouts = name in DISTILLATIONS, (torch.clone,)
    if distils:
        options["divergence"] = ["forward_kl", "reverse_kl", "jsd"][number // 6]
        options |= {"temperature": rng.choice([1.0, 3.0]), "alpha": rng.choice([1.0, 0.3])}
    elif name == "fused_linear_log_probs":
        options["reduction"] = "none"
    else:
        options["label_smoothing"] = rng.choice([0.0, 0.1])

    @SETTINGS
    @given(st.data(), st.integers(0, 2**20), st.sampled_from(drawing.UPSTREAM))
    def check(data, seed, upstream):
        generator = torch.Generator().manual_seed(seed)
        x, teacher = (
            drawing.rows_of_logits(data.draw, generator, N, V, (dtype,), layouts).to(device) for _ in range(2)
        )
        y = drawing.index_targets(generator, N, V).to(device)
        if name in HIDDEN:
            x, teacher = drawing.finite(x), drawing.finite(teacher)
        leaf, size = x.detach().requires_grad_(), 1.0
        if distils:
            *true, rows, size = distilled(x, teacher, y, finite_or_1(upstream), **options)
            loss = call(DISTILLATIONS, name, leaf, teacher, y, backend=backend, **options)
            if (true[1].abs() > torch.finfo(dtype).max / 2).any():
                return
        else:
            true = truth(x, y, finite_or_1(upstream), **options)
            rows, _ = truth(x, y, 0.0, **{**options, "reduction": "none"})
            loss = call(CALLS, name, leaf, y, backend=backend, **{"label_smoothing": 0.0} | options)
            true[1].masked_fill_(x == -torch.inf, 0.0)  # PyTorch's is NaN
        dx = gradient(loss, leaf, upstream)
        ignored = (y == -100).unsqueeze(1).expand_as(x)
        drawing.judge((loss, dx), true, rows, upstream, ignored, capped=softcap is not None, size=size)

    check()


@pytest.mark.parametrize("number", range(15))
def test_any_options(number, backend, device, no_worse, monkeypatch):
    """Options in any combination, on logits of the order of 1; several launches for a row, and several blocks."""
    rng = random.Random(number)
    dtype, way = DTYPES[number % 3], ["logits", "gradient in forward", "hidden states"][number // 5]
    N, V = rng.choice([(1, 2), (3, 40), (6, 1000), (5, 5003), (3, 24001)])
    probs = way != "gradient in forward" and rng.random() < 0.3
    options = {
        "reduction": rng.choice(["mean", "sum", "none"]),
        "label_smoothing": rng.choice([0.0, 0.3]),
        "softcap": rng.choice([None, 0.7, 30.0]),
        "logit_scale": rng.choice([1.0, 0.25, -2.0]),
        "z_loss": rng.choice([0.0, 1e-2]),
        "ignore_index": -100 if probs else rng.choice([-100, 0, V + 5, [0, -7, V - 1]]),
    }
    weighted, token_weighted = rng.random() < 0.5, rng.random() < 0.5
    ours = {"backend": backend}
    if way == "gradient in forward":
        ours["grad_in_forward"] = True
    elif way == "hidden states" and rng.random() < 0.5:
        blocks = LinearPlan("vocabulary blocks", max(1, V * 2 // 5), 0)
        monkeypatch.setattr(calls, "choose", lambda *_: blocks)

    def check():
        h, w, b, y = problem(N, V, 16, dtype, device=device)
        y[-1] = -100 if options["ignore_index"] == -100 else y[-1]
        q = torch.rand(N, V, dtype=torch.float64).to(device, dtype)
        weight = torch.rand(V, dtype=torch.float64).add(0.1).to(device, dtype) if weighted else None
        token_weight = torch.rand(N, device=device) if token_weighted else None

        def loss(of_logits, of_hidden, leaves, **more):
            *leaves, target = leaves if probs else (*leaves, y)
            more |= options | {"weight": None if weight is None else weight.to(leaves[0].dtype)}
            if len(leaves) == 1:
                return of_logits(leaves[0], target, token_weight=token_weight, **more)
            h, w, b = leaves
            return of_hidden(h, w, target, linear_bias=b, token_weight=token_weight, **more)

        def plainly(h, w, target, linear_bias, **more):
            return reference.cross_entropy(F.linear(h, w, linear_bias), target, **more)

        tensors = [h, w, b] if way == "hidden states" else [(F.linear(h, w, b) * 2).detach()]
        tensors += [q] * probs
        plain = reference.cross_entropy, plainly
        three = (
            gradients(lambda *leaves: loss(fused_cross_entropy, fused_linear_cross_entropy, leaves, **ours), tensors),
            gradients(lambda *leaves: loss(*plain, leaves), tensors),
            gradients(lambda *leaves: loss(*plain, leaves), [t.double() for t in tensors]),
        )
        for place, results in enumerate(zip(*three, strict=True)):
            no_worse(f"{place}", *results, terms=V, logits=8.0, via=dtype, scale=1.5)

    for seed in range(CASES):
        torch.manual_seed(seed)
        check()
