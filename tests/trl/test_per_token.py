"""This package computes what TRL's head computes for every token. TRL's own function is the reference."""

import pytest
import torch

from fused_ignore_ce.trl import summed_log_probs
from fused_ignore_ce.trl.per_token import Head, PerToken, per_token

ChunkedLogProbFunction = pytest.importorskip("trl.kernels").ChunkedLogProbFunction

OPTIONS = {"memory_budget": None, "backend": "torch"}
N, V, D = 13, 67, 8  # V: three of TRL's chunks, the last one short
CASES = {
    "plain": {},
    "bias, temperature": {"bias": True, "logit_scale": 1.3, "temperature": 0.7},
    "softcap": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 1.6},
}


def operands(dtype=torch.float32, rows=N, device="cpu", bias=False, softcap=None, logit_scale=1.0, temperature=1.0):
    torch.manual_seed(0)
    tensors = torch.randn(rows, D), torch.randn(V, D), torch.randn(V) if bias else None
    leaves = [None if t is None else t.to(device, dtype).requires_grad_() for t in tensors]
    return Head(*leaves, softcap, logit_scale, temperature), torch.randint(V, (rows,)).to(device)


def of_trl(head, targets):
    hidden, weight, bias, softcap, logit_scale, temperature = head
    names = PerToken._fields[1:]
    return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature, 32, softcap, logit_scale, names)


def gradients(head, found, upstream):
    leaves = [t for t in head[:3] if t is not None]
    return torch.autograd.grad(found[: len(upstream)], leaves, upstream, retain_graph=True)


@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, backend, summed, device):
    options = {**OPTIONS, "backend": backend}
    head, targets = operands(device=device, **CASES[case])
    targets[:3] = (head.logits()[:3] + 0.0).argmax(-1)  # some are the likeliest
    expected = of_trl(head, targets)
    found = per_token(head, targets, PerToken._fields, summed, options)
    assert found.is_top1.any()
    assert not found.is_top1.all()
    for name, ours, theirs in zip(PerToken._fields, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    # Upstream gradients: one number for all rows, as of a sum, or others. The entropy has one where that is promised.
    for of_log_probs in (torch.full((N,), -0.3, device=device), torch.randn(N).to(device)):
        for upstream in ([of_log_probs],) if summed else ([of_log_probs], [of_log_probs, torch.randn(N).to(device)]):
            found = per_token(head, targets, PerToken._fields, summed, options)  # its first backward
            for ours, theirs in zip(gradients(head, found, upstream), gradients(head, expected, upstream), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.entropy.requires_grad != summed


def test_only_what_is_asked_for():
    head, targets = operands()
    for summed in (False, True):
        found = per_token(head, targets, ("log_probs",), summed, OPTIONS)
        assert found[1:] == (None, None, None, None)


@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
def test_no_tokens(summed):
    head, targets = operands(rows=0)
    found = per_token(head, targets, PerToken._fields, summed, OPTIONS)
    assert all(value.shape == (0,) for value in found)
    for gradient in torch.autograd.grad(found.log_probs.sum(), head[:2]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gradients_of_a_sum_come_from_forward(monkeypatch):
    """The first backward computes no logits, unless the upstream gradient differs from row to row."""
    again = []
    original = summed_log_probs.rows_function
    monkeypatch.setattr(summed_log_probs, "rows_function", lambda *args: again.append(1) or original(*args))
    head, targets = operands()

    def backward(upstream):
        log_probs = per_token(head, targets, (), True, OPTIONS).log_probs
        return log_probs, torch.autograd.grad(log_probs, head[:2], upstream, retain_graph=True)

    log_probs, first = backward(torch.full((N,), 0.25))
    assert not again
    second = torch.autograd.grad(log_probs, head[:2], torch.full((N,), 0.25))
    assert again == [1]  # what forward computed is not kept any longer
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    backward(torch.linspace(0, 1, N))
    assert again == [1, 1]


def test_an_operand_that_changed_before_backward_is_an_error():
    head, targets = operands()
    log_probs = per_token(head, targets, (), True, OPTIONS).log_probs
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
def test_frozen_head_and_bfloat16(summed):
    head, targets = operands(torch.bfloat16)
    exact = Head(head.hidden.detach().double().requires_grad_(), head.weight.detach().double(), *head[2:])
    head = head._replace(weight=head.weight.detach())
    truth = exact.hidden @ exact.weight.T
    truth = truth.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (d_truth,) = torch.autograd.grad(truth.sum(), exact.hidden)
    errors = []
    for found in (per_token(head, targets, PerToken._fields, summed, OPTIONS), of_trl(head, targets)):
        assert found[0].dtype == torch.float32
        (d_hidden,) = torch.autograd.grad(found[0].sum(), head.hidden)
        errors.append([(found[0] - truth).abs().max().item(), (d_hidden - d_truth).abs().max().item()])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.5 * theirs + 1e-3


@pytest.mark.parametrize("summed", [False, True], ids=["", "summed"])
def test_logits_of_bfloat16_that_are_not_rounded(summed):
    head, targets = operands(torch.bfloat16)
    logits = head.hidden.detach().double() @ head.weight.detach().double().T
    truth = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    rounded = per_token(head, targets, (), summed, OPTIONS).log_probs
    found = per_token(head, targets, (), summed, {**OPTIONS, "logits_dtype": torch.float32}).log_probs
    assert (found - truth).abs().max() < 1e-5
    assert (rounded - truth).abs().max() > 1e-3
    torch.autograd.grad(found.sum(), head[:2])
