"""Whatever is done to deferred logits gives what it gives without deferral, gradients included."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce.deferred import DeferredLogits, defer

from ..helpers.deferred_operations import LOG_PROBS, OTHERS, RECORDED, VECTOR, B, D, T, V


def head(dtype=torch.float32):
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    return hidden, weight, bias


def gradients(out, leaves):
    """The gradients for an upstream gradient that is not 1."""
    upstream = torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_operation_stays_deferred_and_reads_as_the_original(name):
    leaves = head()
    x = defer(*leaves)
    ours, plain = RECORDED[name](x), RECORDED[name](F.linear(*leaves))
    assert isinstance(ours, DeferredLogits)
    assert not x.is_materialized
    assert (ours.shape, ours.dtype, ours.requires_grad) == (plain.shape, plain.dtype, True)
    assert not ours.is_materialized
    assert type(ours.materialize()) is torch.Tensor
    torch.testing.assert_close(ours.materialize(), plain)
    if plain.numel() == x.numel() and name != "two-heads":  # the same matrix product
        assert torch.equal(ours.materialize(), plain)
    for mine, true in zip(gradients(ours.sin(), leaves), gradients(plain.sin(), leaves), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("name", RECORDED)
def test_cross_entropy_of_recorded_operations(name, no_worse):
    leaves = head()
    x = defer(*leaves)
    ours, plain = RECORDED[name](x), RECORDED[name](F.linear(*leaves))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = RECORDED[name](F.linear(*wide).double())
    if ours.dim() > 2 and plain.shape[1] != V:
        ours, plain, true = (t.reshape(-1, t.shape[-1]) for t in (ours, plain, true))
    classes = ours.shape[1] if ours.dim() > 1 else ours.shape[0]
    target = torch.arange(ours.numel() // classes).view(ours.shape[:1] + ours.shape[2:]) * 5 % classes
    target.view(-1)[-2:] = -100
    losses = [F.cross_entropy(t, target, reduction="sum", label_smoothing=0.1) for t in (ours, plain, true.double())]
    assert not x.is_materialized
    assert not ours.is_materialized
    no_worse("loss", *losses, terms=target.numel())
    grads = [torch.autograd.grad(loss * 0.7, t) for loss, t in zip(losses, (leaves, leaves, wide), strict=True)]
    for leaf, *found in zip(("hidden", "weight", "bias"), *grads, strict=True):
        no_worse(leaf, *found, scale=1.0, terms=x.numel())


@pytest.mark.parametrize("name", LOG_PROBS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nll_loss_of_log_probabilities(name, reduction):
    leaves = head()
    log_probs = LOG_PROBS[name]
    x = defer(*leaves)
    ours, plain = log_probs(x), log_probs(F.linear(*leaves))
    target = (torch.arange(ours.numel() // V) * 5 % V).view(ours.shape[:1] + ours.shape[2:])
    target.view(-1)[1] = -100
    weight = torch.linspace(0.5, 1.5, V)
    losses = [F.nll_loss(t, target, weight, reduction=reduction) for t in (ours, plain)]
    assert not ours.is_materialized
    torch.testing.assert_close(*losses)
    for mine, true in zip(*(gradients(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(mine, true)
    torch.testing.assert_close(ours.materialize(), plain)


def test_nll_loss_of_what_are_no_log_probabilities_is_pytorchs():
    leaves = head()
    target = torch.arange(B * T) % V
    losses = [F.nll_loss(linear(*leaves).view(-1, V), target) for linear in (defer, F.linear)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_computes_the_logits_and_goes_on(name):
    leaves = head()
    x = defer(*leaves)
    ours, plain = OTHERS[name](x), OTHERS[name](F.linear(*leaves) * 1.0)
    assert (ours.shape, ours.dtype, ours.requires_grad) == (plain.shape, plain.dtype, True)
    for mine, true in zip(gradients(ours * 1.5, leaves), gradients(plain * 1.5, leaves), strict=True):
        torch.testing.assert_close(mine, true)
    torch.testing.assert_close(ours * 1.0, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_programs_of_random_operations(seed):
    """Whatever the order of operations, values, loss and gradients are those of plain logits."""
    rng = random.Random(seed)
    leaves = head(torch.float64)
    pair = [defer(*leaves), F.linear(*leaves)]
    safe = [n for n in RECORDED if "two-heads" not in n]
    done = []
    for _ in range(rng.randint(1, 7)):
        name = rng.choice(safe if rng.random() < 0.8 else list(OTHERS))
        try:
            torch.manual_seed(seed)
            after = (RECORDED | OTHERS)[name](pair[1].clone())
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue  # the operation is not for logits of this shape
        if after.dim() == 0 or after.numel() == 0:
            continue
        done.append(name)
        pair = [(RECORDED | OTHERS)[name](pair[0]), after]
    ours, plain = pair
    assert ours.shape == plain.shape, done
    if rng.random() < 0.5:
        results = [t.double().sin().sum() for t in pair]
    else:
        classes = plain.shape[1] if plain.dim() > 1 else plain.shape[0]
        target = torch.randint(classes, plain.shape[:1] + plain.shape[2:] if plain.dim() > 1 else ())
        results = [F.cross_entropy(t.double(), target, reduction="sum") for t in pair]
    torch.testing.assert_close(*results, msg=lambda m: f"{done}: {m}", rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours * 1.0, plain * 1.0, msg=lambda m: f"{done}: {m}", rtol=1e-5, atol=1e-5)
    for mine, true in zip(*(torch.autograd.grad(r, leaves, allow_unused=True) for r in results), strict=True):
        zeros = torch.zeros(())
        torch.testing.assert_close(
            zeros if mine is None else mine, zeros if true is None else true, rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_dtypes_are_those_of_the_logits(dtype, autocast, upcast, no_worse):
    leaves = head(dtype)
    target = torch.arange(B * T) % V
    target[3] = -100
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for linear in (defer, F.linear):
            logits = linear(*leaves)
            logits = logits.float() if upcast else logits
            losses.append(F.cross_entropy(logits.view(-1, V), target))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    losses.append(F.cross_entropy(F.linear(*wide).view(-1, V), target))
    via = torch.bfloat16 if autocast else dtype  # the dtype of the logits
    no_worse("loss", *losses, terms=V, via=via)
    grads = [torch.autograd.grad(loss, t) for loss, t in zip(losses, (leaves, leaves, wide), strict=True)]
    for leaf, *found in zip(("hidden", "weight", "bias"), *grads, strict=True):
        no_worse(leaf, *found, scale=1 / (B * T), terms=V, via=via)


@pytest.mark.parametrize("probabilities", ["rows", "classes second"])
def test_probability_targets(probabilities):
    leaves = head()
    target = torch.rand(B, V, T).softmax(1)
    losses = []
    for linear in (defer, F.linear):
        logits = linear(*leaves)
        if probabilities == "rows":
            losses.append(F.cross_entropy(logits.view(-1, V), target.transpose(1, 2).reshape(-1, V)))
        else:
            losses.append(F.cross_entropy(logits.transpose(1, 2), target))
    torch.testing.assert_close(*losses)
    for mine, true in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(mine, true)


def test_every_keyword_of_cross_entropy_reaches_the_loss():
    leaves = head()
    target = torch.arange(B * T) % V
    for keywords in (
        {"weight": VECTOR + 2},
        {"ignore_index": 3},
        {"size_average": False},
        {"reduce": False},
        {"reduction": "none"},
        {"label_smoothing": 0.3},
    ):
        losses = [F.cross_entropy(linear(*leaves).flatten(0, 1), target, **keywords) for linear in (defer, F.linear)]
        torch.testing.assert_close(*losses, msg=lambda m, k=keywords: f"{k}: {m}")


def test_it_is_computed_once_and_in_the_grad_mode_of_the_forward():
    leaves = head()
    x = defer(*leaves)
    with torch.no_grad():
        first = x.materialize()
        assert first.requires_grad  # as logits that were not deferred would
        assert not x.sum().requires_grad
    assert x.materialize() is first
    with torch.no_grad():
        y = defer(*leaves)
    assert not y.requires_grad
    assert not y.materialize().requires_grad
    assert not defer(*leaves).detach().requires_grad


def test_reading_after_the_head_changed_is_an_error():
    leaves = head()
    x = defer(*leaves)
    F.cross_entropy(x.view(-1, V), torch.zeros(B * T, dtype=torch.int64)).backward()
    assert x.detach().sum().isfinite()
    y = defer(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="before optimizer.step"):
        y.sum()
    with pytest.raises(RuntimeError, match="before optimizer.step"):
        F.cross_entropy(y.view(-1, V), torch.zeros(B * T, dtype=torch.int64))
    assert x.shape == (B, T, V)


def test_a_freed_head_is_an_error_that_says_what_to_do():
    hidden, weight = torch.randn(3, D), torch.nn.Parameter(torch.randn(V, D))
    x = defer(hidden, weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="reshard_after_forward=False"):
        F.cross_entropy(x, torch.zeros(3, dtype=torch.int64))


def test_strides_are_those_of_computed_logits():
    x, plain = defer(*head()), F.linear(*head())
    for view in (lambda x: x, lambda x: x[:, 1:], lambda x: x[:1], lambda x: x.transpose(1, 2), lambda x: x.float()):
        for then in (lambda x: x, lambda x: x / 2, lambda x: x.softmax(-1), lambda x: x.contiguous()):
            ours, theirs = then(view(x)), then(view(plain))
            assert ours.stride() == theirs.stride()
            assert ours.is_contiguous() == theirs.is_contiguous()
    ours, theirs = (t.transpose(1, 2).log_softmax(1) for t in (defer(*head()), plain))
    assert ours.is_contiguous()
    assert ours.materialize().stride() == theirs.stride()
    x = defer(*head())
    part = x[:, 1:]
    x.materialize()
    assert part.materialize().stride() == part.stride()
    assert torch.equal(part.materialize(), x.materialize()[:, 1:])


def test_hooks_see_the_gradient_of_what_is_read():
    leaves = head()
    x = defer(*leaves)
    seen = []
    x.register_hook(seen.append)
    x.square().sum().backward()
    torch.testing.assert_close(seen[0], 2 * F.linear(*leaves))


def test_a_gradient_is_retained_before_and_after_a_loss():
    target = torch.zeros(B * T, dtype=torch.int64)
    leaves = head()
    grads = []
    for linear in (defer, F.linear):
        x = linear(*leaves)
        loss = F.cross_entropy(x.view(-1, V), target)
        x.retain_grad()
        (loss + x.logsumexp(-1).sum()).backward()
        grads.append(x.grad)
        assert type(x.grad) is torch.Tensor
    torch.testing.assert_close(*grads)
    y = defer(*head())
    y.retain_grad()
    y.square().sum().backward()
    torch.testing.assert_close(y.grad, 2 * y.materialize())


def test_a_part_that_was_read_and_then_written_is_seen():
    found = []
    for linear in (defer, F.linear):
        torch.manual_seed(0)
        x = linear(*head()) * 1
        part = x[:, 1:]
        assert part.sum().isfinite()
        x[:, 2] = 0.0
        found.append(part + 0)
    torch.testing.assert_close(*found)


def test_writing_to_the_tensor_that_was_read_is_seen():
    leaves = head()
    x = defer(*leaves)
    x.detach().zero_()
    value = x.materialize()
    with torch.no_grad():
        value.fill_(1.0)
    target = torch.zeros(B * T, dtype=torch.int64)
    torch.testing.assert_close(F.cross_entropy(x.view(-1, V), target), torch.tensor(float(V)).log())


def test_copies_and_files_hold_real_logits():
    leaves = head()
    plain = F.linear(*leaves).detach()
    for copied in (pickle.loads(pickle.dumps(defer(*leaves).detach())), copy.deepcopy(defer(*leaves).detach())):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, plain)


def test_logits_are_shown_as_their_values():
    leaves = head()
    x = defer(*leaves)
    assert f"{x.detach()}" == str(x.detach()) == repr(F.linear(*leaves).detach())
    x = defer(*leaves)
    with torch.no_grad():
        leaves[1].zero_()
    about = f"shape=({B}, {T}, {V}), dtype=torch.float32, device='cpu'"
    assert str(x).startswith(f"DeferredLogits({about}; logits: the head's weights or the hidden states were changed")


def test_compiled_functions_take_deferred_logits():
    torch._dynamo.reset()
    leaves = head()
    target = torch.arange(B * T) % V

    @torch.compile(backend="aot_eager")
    def loss_of(logits):
        return F.cross_entropy(logits.float().view(-1, V), target)

    ours, plain = loss_of(defer(*leaves)), loss_of(F.linear(*leaves))
    torch.testing.assert_close(ours, plain)
    for mine, true in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(mine, true)
