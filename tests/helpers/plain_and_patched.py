"""Programs on a plain and a patched model, which have to return the same and give the same gradients."""

import torch
import torch.nn.functional as F

from fused_ignore_ce.hf import fusion_report, patch_model

from .hf_worker import V, batches, llama

BATCH = batches(1)[0]
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
TARGET = LABELS.clamp(min=0)
ROWS = LABELS.numel()


def small():
    return llama(num_hidden_layers=1)


def cross_entropy(x, **options):
    return F.cross_entropy(x.reshape(-1, V), LABELS.reshape(-1), **options)


def entropy(x):
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()


def both(program, build=small, **options):
    """What a program returns for a plain and for a patched model, and the gradients of all parameters."""
    found = []
    for patch in (lambda m: m, lambda m: patch_model(m, **options)):
        model = patch(build())
        torch.manual_seed(0)
        result = program(model)
        found.append((result, {name: p.grad for name, p in model.named_parameters()}))
    return found, model


def same(found, plain):
    if isinstance(plain, torch.Tensor):
        assert found.requires_grad == plain.requires_grad
        torch.testing.assert_close(found * 1, plain, rtol=2e-5, atol=1e-6)
    elif isinstance(plain, (tuple, list)):
        assert len(found) == len(plain)
        for mine, true in zip(found, plain, strict=True):
            same(mine, true)
    elif isinstance(plain, dict):
        assert found.keys() == plain.keys()
        for name in plain:
            assert (found[name] is None) == (plain[name] is None), name
            if plain[name] is not None:
                torch.testing.assert_close(
                    found[name], plain[name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
    else:
        assert found == plain


def check(program, build=small, reads=None, **options):
    """Runs a program on both models; `reads` is whether it computes logits, if that is to be checked."""
    (plain, ours), model = both(program, build, **options)
    same(ours, plain)
    if reads is not None:
        assert bool(fusion_report(model).reads) == reads, fusion_report(model).reads


def steps(loss_of):
    """A program that takes a loss of the logits and calls backward."""

    def program(model):
        loss = loss_of(model(IDS).logits)
        loss.backward()
        return loss

    return program


def no_grad(function):
    with torch.no_grad():
        return function()
