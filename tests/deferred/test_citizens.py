"""Deferred logits are citizens of autograd: programs on a patched model do what they do on a plain copy of it.

One test for each kind of program that an imitated graph got wrong. `plain` is the unpatched model.
"""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import V, llama
from ..helpers.plain_and_patched import (
    IDS,
    LABELS,
    check,
    cross_entropy,
    entropy,
    no_grad,
    small,
    steps,
)

#: 1. What was made under no_grad is a constant.
CONSTANTS = {
    "a target": lambda x: -(no_grad(lambda: (x / 2).softmax(-1)) * x.log_softmax(-1)).sum(-1).mean(),
    "the logits": lambda x: -(x.softmax(-1) * no_grad(lambda: x.log_softmax(-1))).sum(-1).mean(),
    "weights": lambda x: (
        cross_entropy(x, reduction="none") * no_grad(lambda: x.softmax(-1).amax(-1)).flatten()
    ).mean(),
    "a view": lambda x: (no_grad(lambda: x[:, 1:].softmax(-1)) * x[:, :-1].log_softmax(-1)).sum(-1).mean(),
    "detached": lambda x: (x.detach().softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "a loss": lambda x: cross_entropy(x) * no_grad(lambda: cross_entropy(x / 2)) + no_grad(lambda: entropy(x)),
    "inference": lambda x: cross_entropy(x) + _inferred(x),
}


def _inferred(x):
    with torch.inference_mode():
        return float((x / 2).softmax(-1).amax(-1).mean())


@pytest.mark.parametrize("loss", CONSTANTS.values(), ids=CONSTANTS)
def test_constants(loss):
    check(steps(loss))


def test_a_teachers_head_gets_no_gradient():
    def program(model):
        teacher = (
            patch_model(llama(seed=1, num_hidden_layers=1))
            if isinstance(model(IDS).logits, DeferredLogits)
            else llama(seed=1, num_hidden_layers=1)
        )
        with torch.no_grad():
            target = teacher(input_ids=IDS, labels=LABELS).logits
        loss = -(target.softmax(-1) * model(IDS).logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        return loss, all(p.grad is None for p in teacher.parameters())

    check(program)


#: 2. A detached tensor that is told to require a gradient is a leaf; checkpoints of both kinds make such.
def _leaf(model):
    x = model(IDS).logits.detach()
    x.requires_grad = True
    (cross_entropy(x) + entropy(x)).backward()
    return x.grad, x.is_leaf


def test_leaves():
    check(_leaf)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("loss", [cross_entropy, lambda x: cross_entropy(x) + entropy(x), lambda x: x.square().mean()],
                         ids=["cross entropy", "and entropy", "read"])  # fmt: skip
def test_checkpoints(loss, reentrant):
    check(steps(lambda x: checkpoint(loss, x, use_reentrant=reentrant)))


#: 3. Hooks and retained gradients, before and after reads and losses.
def _hooked(x):
    x.max()
    x.register_hook(lambda g: g * 3)
    return cross_entropy(x)


def _hooked_after(x):
    loss = cross_entropy(x)
    x.register_hook(lambda g: g * 3)
    return loss


def _hooked_branch(x):
    p = x.softmax(-1)
    p.register_hook(lambda g: g * 3)
    return -(p * x.log_softmax(-1)).sum(-1).mean()


def _doubled_and_dropped(x):
    """One branch twice, the other not at all: the sum of both would look complete to a count of branches."""
    p, q = x.softmax(-1), x.log_softmax(-1)
    p.register_hook(lambda g: g + g)
    q.register_hook(torch.zeros_like)
    return -(p * q).sum(-1).mean()


HOOKS = {f.__name__: f for f in (_hooked, _hooked_after, _hooked_branch, _doubled_and_dropped)}


@pytest.mark.parametrize("loss", HOOKS.values(), ids=HOOKS)
def test_hooks(loss):
    check(steps(loss))


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_retained_gradients(when, read):
    def program(model):
        outputs = model(input_ids=IDS, labels=LABELS)
        x = outputs.logits
        if read:
            x.max()
        loss = outputs.loss
        if when == "before":
            x.retain_grad()
        loss = loss + entropy(x / 2)
        if when == "after":
            x.retain_grad()
        loss.backward()
        return x.grad, x.retains_grad

    check(program)


def test_gradients_in_intermediate_tensors():
    def program(model):
        x = model(IDS).logits
        y = x / 2
        loss = cross_entropy(y) + entropy(x)
        return torch.autograd.grad(loss, [x, y, model.lm_head.weight, x], retain_graph=True), torch.autograd.grad(
            loss, y
        )

    check(program)


def test_backward_twice():
    def program(model):
        x = model(IDS).logits
        loss = cross_entropy(x) + entropy(x)
        loss.backward(retain_graph=True)
        (2 * loss + x.logsumexp(-1).mean()).backward()
        return loss

    check(program)


def test_two_models_in_one_loss():
    def program(model):
        other = llama(seed=1, num_hidden_layers=1)
        x = model(IDS).logits
        if isinstance(x, DeferredLogits):
            patch_model(other)
        y = other(IDS).logits
        loss = (y.softmax(-1) * (y.log_softmax(-1) - x.log_softmax(-1))).sum(-1).mean()
        loss.backward()
        return loss, {name: p.grad for name, p in other.named_parameters()}

    check(program, reads=False)


#: 4. Threads.
def test_threads():
    plain, model, other = small(), patch_model(small()), llama(seed=1, num_hidden_layers=1)
    expected = [m(input_ids=IDS, labels=LABELS).loss.item() for m in (plain, other)]
    found, errors = [[] for _ in range(4)], []

    def train(losses, which):
        try:
            for _ in range(6):
                losses.append(which(input_ids=IDS, labels=LABELS).loss.item())
        except Exception as e:
            errors.append(e)

    def copies():
        try:
            for _ in range(6):
                copy.deepcopy(model)
                pickle.loads(pickle.dumps(model))
                model.generate(IDS[:, :3], max_new_tokens=2, do_sample=False)
        except Exception as e:
            errors.append(e)

    whose = [model, model, other]
    threads = [threading.Thread(target=train, args=args) for args in zip(found, whose, strict=False)]
    threads.append(threading.Thread(target=copies))
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    for losses, of in zip(found, (0, 0, 1), strict=False):
        assert losses == pytest.approx([expected[of]] * 6, rel=1e-5)


def test_replicas_of_data_parallel():
    """What `nn.DataParallel` makes of a model: its replicas, each with parameters of its own, run in threads."""
    model = patch_model(small())
    replica = copy.copy(model)
    replica.__dict__ = model.__dict__.copy()
    replica._modules = dict(model._modules)
    replica._modules["lm_head"] = head = model.lm_head._replicate_for_data_parallel()
    head._parameters = {"bias": None}
    head.weight = (model.lm_head.weight * 2).detach().requires_grad_()
    logits = replica(IDS).logits
    torch.testing.assert_close(logits * 1, model(IDS).logits * 2)
    cross_entropy(logits).backward()
    assert head.weight.grad.abs().sum() > 0
    assert model.lm_head.weight.grad is None


#: 5. Writing in place.
def _operand(x):
    b = torch.linspace(-1, 1, V)
    y = x + b
    b.zero_()
    return cross_entropy(y)


def _trained_operand(x):
    b = torch.linspace(-1, 1, V).requires_grad_() * 1
    y = x + b
    with torch.no_grad():
        b.zero_()
    return cross_entropy(y)


def _view_was_read(x):
    a = x.float().flatten(0, 1)
    a.max()
    x.div_(2.0)
    return F.cross_entropy(a, LABELS.flatten()) + cross_entropy(x)


def _view_is_written(x):
    a, y = x[:, 1:], x * 2
    a.mul_(0.5)
    return cross_entropy(x) + entropy(y)


def _masked(x):
    x[:, :, 5:9] = -5.0
    return cross_entropy(x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach() ** 2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def _written_and_bypassed(x):
    x = x * 1
    x.div_(2.0)
    return _Square.apply(x).mean()


IN_PLACE = {f.__name__: f for f in (_operand, _trained_operand, _view_was_read, _view_is_written, _masked,
                                    _written_and_bypassed)}  # fmt: skip


@pytest.mark.parametrize("loss", IN_PLACE.values(), ids=IN_PLACE)
def test_in_place(loss):
    check(steps(loss))


class _HandsOn(torch.autograd.Function):
    """PyTorch puts one such around a module that has full backward hooks."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g


class _Clones(_HandsOn):
    """DDP puts one such behind a model that may have unused parameters."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


HANDED_ON = {
    "loss": cross_entropy,
    "rows": lambda x: F.cross_entropy(x.reshape(-1, V), LABELS.flatten()),
    "view that is read": lambda x: x.view(-1, V)[:, :3].sum(1).sin().sum(),
    "entropy": entropy,
}


@pytest.mark.parametrize("function", [_HandsOn, _Clones])
@pytest.mark.parametrize("loss", HANDED_ON.values(), ids=HANDED_ON)
def test_a_function_that_returns_what_it_was_given(loss, function):
    check(steps(lambda x: loss(function.apply(x))))


def test_what_a_function_returns_is_fused():
    for function in (_HandsOn, _Clones):
        model = patch_model(small())
        cross_entropy(function.apply(model(IDS).logits)).backward()
        assert fusion_report(model).fused["cross_entropy"].calls == 1
        assert not fusion_report(model).reads
