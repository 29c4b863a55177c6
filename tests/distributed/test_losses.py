"""A vocabulary that is sharded over ranks gives the losses, gradients and statistics of one process."""

import itertools

import pytest
import torch

from fused_ignore_ce.backends import reference

from ..helpers.shards import IGNORED, IGNORED_IDS, SHARDS, D, N, V, joined, problem, run

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"softcap": 3.0, "logit_scale": 1.5},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7},
}
#: Every reduction without options, and every option with one of the reductions.
COMBINATIONS = [
    pytest.param(OPTIONS[name], reduction, id=f"{name}-{reduction}")
    for name, reduction in [
        ("plain", "mean"), ("plain", "sum"), ("plain", "none"), ("smoothing", "mean"), ("z-loss", "none"),
        ("softcap", "sum"), ("everything", "mean"), ("everything", "none"),
    ]
]  # fmt: skip


def truth(tensors, wanted, upstream, dtype, **options):
    """Loss and gradients of the whole vocabulary, by the reference."""
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    tensors = {k: t.clone().requires_grad_(k in wanted) for k, t in tensors.items()}
    rest = dict(tensors)
    if "linear_weight" in rest:
        operands = (rest.pop(name) for name in ("input", "linear_weight", "linear_bias"))
        rest["input"] = torch.nn.functional.linear(*operands)
    loss = reference.cross_entropy(**rest, **options)
    (loss * upstream).sum().backward()
    return loss.detach(), {name: tensors[name].grad for name in wanted}


def check(ranks, no_worse, loss, tensors, shards, wanted, options, **more):
    """The loss is the same bits on all ranks; it and the gradients are no worse than PyTorch's in one process."""
    upstream = torch.linspace(0.5, 2.0, N) if options["reduction"] == "none" else torch.tensor(1.7)
    true, true_grads = truth(tensors, wanted, upstream, torch.float64, **options)
    plain, plain_grads = truth(tensors, wanted, upstream, torch.float32, **options)
    found = run(ranks, loss, tensors, shards, wanted=wanted, upstream=upstream, **options, **more)
    for f in found:
        assert torch.equal(f["loss"].nan_to_num(7.0), found[0]["loss"].nan_to_num(7.0)), (
            "not the same bits on all ranks"
        )
    no_worse("loss", found[0]["loss"], plain, true, terms=V)
    index = tensors["target"]
    kept = index.dim() == 2 or not all(i in IGNORED_IDS for i in index.tolist())
    for name in wanted:
        gradient = joined(name, found, tensors, loss)
        if kept:
            no_worse(f"d{name}", gradient, plain_grads[name], true_grads[name], scale=10.0, terms=V)
        else:
            assert (gradient == 0).all()


def problems():
    """(tensors, ignored ids), with indices or probabilities, class weights or none, and some, all or none ignored."""
    for probs, weighted, ignored in itertools.product((False, True), (False, True), IGNORED):
        if not probs or ignored == "none":
            yield problem(ignored, probs, weighted), -100 if probs else IGNORED_IDS


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize(("options", "reduction"), COMBINATIONS)
def test_logits_loss(ranks, no_worse, shards, reduction, options):
    for tensors, ignore_index in problems():
        wanted = ["input", *["target"] * (tensors["target"].dim() == 2)]
        call = {"reduction": reduction, "ignore_index": ignore_index, **options}
        check(ranks, no_worse, "fused_cross_entropy", tensors, shards, wanted, call)


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize(("options", "reduction"), COMBINATIONS)
def test_linear_loss(ranks, no_worse, shards, reduction, options):
    """With one tile of logits on each rank, and with several."""
    for (tensors, ignore_index), plan in itertools.product(problems(), (None, "token chunks", "vocabulary blocks")):
        tensors |= {"input": torch.randn(N, D), "linear_weight": torch.randn(V, D), "linear_bias": torch.randn(V)}
        wanted = ["input", "linear_weight", "linear_bias", *["target"] * (tensors["target"].dim() == 2)]
        call = {"reduction": reduction, "ignore_index": ignore_index, **options}
        check(ranks, no_worse, "fused_linear_cross_entropy", tensors, shards, wanted, call, plan=plan)
