"""Programs that the fuzzer found: each does on deferred logits what it does on a plain model's."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fused_ignore_ce import defer_logits
from fused_ignore_ce.deferred.logits import defer

from .fuzz.names import HandedOn, ce, entropy, like, picked, z_loss

B, T, D, V = 2, 3, 8, 11


def run(program, bias):
    """What a program returns for plain and for deferred logits, and the gradients of all leaves."""
    found = []
    for patch in (lambda head: head, defer_logits):
        torch.manual_seed(0)
        head = patch(torch.nn.Linear(D, V, bias, dtype=torch.float64))
        hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
        operand = torch.linspace(0.5, 1.5, V, dtype=torch.float64).requires_grad_()
        result = program(head(hidden), operand)
        leaves = (hidden, operand, *head.parameters())
        found.append([result, *(t.grad for t in leaves)])
    return found


def _second_order(x, b):
    y = x * b
    first = torch.autograd.grad(ce(y) + entropy(x) + z_loss(y), [x, y, b], create_graph=True)
    sum(g.square().sum() for g in first).backward()
    return first[0].detach()


def _written_after_a_loss(x, b):
    x.div_(2)
    loss = ce(x) + ce(x[:, 1:])
    x.mul_(b)
    (loss + ce(x)).backward()
    return loss.detach()


def _written_in_inference_mode(x, b):
    x.grad_fn, x.retain_grad()
    y = 1.5 * x + 0.1
    with torch.inference_mode():
        x += b
    _ = x.grad_fn
    ce(y).backward()
    return x.grad


def _hook_on_a_view_of_a_known_base(x, b):
    seen, y = [], x[:, 1:]
    y.register_hook(lambda g: seen.append(g.clone()))
    x.tolist()
    (y.sin() * b).sum().backward()
    return seen[0]


def _hook_before_a_write(x, b):
    seen, y = [], x / 2
    x.grad_fn, x.register_hook(lambda g: seen.append(g.clone()))
    x[:, 0] = 0.5
    (ce(y) + (x * b).sin().sum()).backward()
    return seen[0]


def _checkpoint(x, b):
    loss = checkpoint(z_loss, x * b, use_reentrant=False)
    return torch.autograd.grad(loss, [x], like(loss), retain_graph=True)[0]


def _dense_gradient_first(x, b):
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    loss, y = -picked(x).sum(), -x[:, -1]
    y.view(-1, V)[0] = 1.0
    (F.cross_entropy(y, torch.tensor([1, 2])) + loss).backward()
    return seen[0]


def _detached_in_place(x, b):
    y = x * b
    y.tolist()
    assert y.detach_() is y
    assert not entropy(y).requires_grad
    return y


def _strides(x, b):
    y = x.transpose(0, 1)
    return torch.tensor([z.stride() for z in (y.log_softmax(-1), (1.5 * y + 0.1).mul_(2), y.clone().add_(1))])


def _one_of_several(x, b):
    part = x.unbind(0)[1]
    x[:, 0] = 0.5
    with pytest.raises(RuntimeError, match="Output 1 of Unbind"):
        part.sum()


def _given_away(x, b):
    memory, y = x.data, x.sin()
    memory.zero_()
    return y.detach() + x.detach()


def _scaled_with_classes_second(x, b):
    loss = F.cross_entropy(x.transpose(1, 2) / 2, torch.ones(B, T, dtype=torch.int64))
    loss.backward()
    assert not getattr(x, "is_materialized", False)
    return loss.detach()


def _weight_of_cast_logits(x, b):
    return ce(x.float(), weight=b.detach().float()).detach()


def _handed_on_and_written(x, b):
    y = HandedOn.apply(x)
    y *= b
    loss = (picked(y) - picked(y).detach()).exp().mean()
    loss.backward()
    return loss.detach()


def _memory_asked_for_in_vain(x, b):
    with pytest.raises(RuntimeError, match="requires grad"):
        x.numpy()
    y = x[None].squeeze(0) * b
    return torch.autograd.grad(y, [x], like(y))[0]


def _new_view_written(x, b):
    x *= 2
    y = x.view(-1, V)
    y *= b
    ce(checkpoint(lambda z: z / 2, x, use_reentrant=True)).backward()
    return x.detach()


def _retained_before_a_write_without_record(x, b):
    x.retain_grad()
    with torch.inference_mode():
        x[:, 1:].mul_(2)
    y = x[:, 1:]
    y *= b
    ce(y).backward()
    return x.grad


def _hook_after_an_unrecorded_view(x, b):
    seen, y = [], x.transpose(0, 1)
    wide = y.expand(2, *y.shape)
    y.register_hook(lambda g: seen.append(g.clone()))
    wide.register_hook(lambda g: g * b)
    wide.sin().sum().backward()
    return seen[0]


def _unrecorded_view_written(x, b):
    wide = x[:, 1:].expand(2, B, T - 1, V)
    wide[0].mul_(2)
    (wide * b).sin().sum().backward()
    return x.detach()


def _numpy_before_a_checkpoint_is_run_again(x, b):
    loss = checkpoint(z_loss, x, use_reentrant=False)
    x.detach().numpy()
    (loss * b.sum()).backward()
    return loss.detach()


def _written_by_numpy_before_a_checkpoint(x, b):
    x.detach().numpy()[0, 0] = 0.5
    loss = checkpoint(z_loss, x * b, use_reentrant=False)
    loss.backward()
    return loss.detach()


def _leaf_of_written_logits(x, b):
    x *= 2
    leaf = x.detach().requires_grad_()
    checkpoint(lambda z: ce(z * b), leaf, use_reentrant=True).backward()
    return leaf.grad


def _handed_on_and_detached_in_place(x, b):
    return HandedOn.apply(x.view(-1, V)).detach_() * b.detach()


def _memory_of_a_view_that_was_handed_on(x, b):
    y = HandedOn.apply(x.split(2, dim=1)[0])
    x.detach().numpy()
    return (y * b).detach()


def _view_of_logits_detached_in_place(x, b):
    z = x * b.detach()
    y = z.flatten(0, 1)
    z.detach_()
    with torch.no_grad():
        z.view(-1, V)[0] = 1.0
    checkpoint(ce, y, use_reentrant=True).backward()
    return y


def _hook_on_a_view_between_two_writes(x, b):
    z, seen = x * b.detach(), []
    y = z.view_as(z)
    y.zero_()
    y.grad_fn, y.register_hook(lambda g: seen.append(g.clone()))
    y += b
    ce(HandedOn.apply(y)).backward()
    return torch.tensor(len(seen))


def _written_to_by_itself(x, b):
    seen, y = [], x[:, :2]
    y.register_hook(lambda g: seen.append(g.clone()))
    y.copy_(y)
    ce(y * b).backward()
    return seen[0] if seen else None


def _expanded_and_written_to_by_itself(x, b):
    y = x.expand(2, *x.shape)
    y.copy_(y)
    return y * b


def _retained_by_a_computed_view(x, b):
    y = x.narrow(1, 0, 2)
    z = y.expand(2, *y.shape)
    z.retain_grad()
    y[:, 1:].mul_(b)
    checkpoint(ce, z, use_reentrant=True).backward()
    return z.grad


def _told_to_require_a_gradient_again(x, b):
    y = x.unbind(0)[1]
    x[:, 0] = 0.5
    return (x * b)[1] if y.requires_grad_() is y else None


def _detached_before_the_backward_of_a_checkpoint(x, b):
    z = x * b.detach()
    z[:, 0] = 0.5
    y = checkpoint(lambda t: t * b, z, use_reentrant=True)
    z.detach_()
    ce(y).backward()
    return y


def _leaf_after_a_checkpoint(x, b):
    z = x * b.detach()
    loss = checkpoint(ce, z, use_reentrant=True)
    z.detach_().requires_grad_()
    loss.backward()
    return z.grad


def _written_in_inference_mode_after_detaching(x, b):
    z = x * b.detach()
    y = z.view_as(z)
    z.detach_()
    with torch.inference_mode():
        z.add_(1)
    return y * b


def _mapped_without_gradients_after_a_write_to_the_base(x, b):
    z = x * b
    first, _ = z.split([1, z.shape[1] - 1], dim=1)
    z[:, 0] = 0.5
    with torch.no_grad():
        mapped = torch.vmap(lambda row: row * 2)(first)
    return z + mapped.sum()


PROGRAMS = [
    value
    for name, value in list(globals().items())
    if name.startswith("_") and getattr(value, "__module__", "") == __name__
]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__.strip("_"))
def test_a_program_does_what_it_does_on_plain_logits(program, bias):
    plain, ours = run(program, bias)
    for mine, true in zip(ours, plain, strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(mine.detach(), true.detach())


@pytest.mark.parametrize("loss", [ce, entropy], ids=["fused", "tiles"])
def test_gradients_of_added_biases_lie_apart(loss):
    """Autograd adds to a leaf's gradient in place, so no two leaves may share the memory of theirs."""
    head = defer_logits(torch.nn.Linear(D, V))
    bias = torch.zeros(V, requires_grad=True)
    total = loss(head(torch.randn(B, T, D)) + bias)
    total.backward(retain_graph=True)
    first = bias.grad.clone()
    total.backward()
    torch.testing.assert_close(bias.grad, 2 * first)
    torch.testing.assert_close(head.bias.grad, 2 * first)


def test_a_backward_that_fails_holds_nothing():
    """Autograd's queue holds the nodes that wait when another one raises, until the thread's next backward."""
    logits = defer_logits(torch.nn.Linear(D, V))(torch.randn(B, T, D))
    ce(logits).backward()
    one, other = logits.log_softmax(-1), logits.softmax(-1)
    loss, reference = (one.cumsum(-1) + other.cumsum(-1)).sum(), weakref.ref(one.grad_fn)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    del logits, one, other, loss
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("of", [lambda x: x.T.masked_fill(x.T > 0.5, -3.0), lambda x: x.T * 2], ids=["mask", "scale"])
def test_strides(of):
    head, x = torch.nn.Linear(D, V), torch.randn(T, D)
    plain = of(head(x))
    assert of(defer_logits(head)(x)).stride() == plain.stride()


def test_views_are_not_detached_in_place():
    """Before PyTorch 2.15, the result of a head with a bias is one."""
    head = torch.nn.Linear(D, V)
    is_view = head(torch.randn(B, T, D))._is_view()
    x = defer_logits(head)(torch.randn(B, T, D))
    for view in (*([x] if is_view else []), x[0], x.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="Can't detach views in-place"):
            view.detach_()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_leaves_made_without_gradients_are_not_written_to(bias):
    operands = torch.randn(B, T, D), torch.randn(V, D), torch.randn(V) if bias else None
    with torch.no_grad():
        x = defer(*operands)
    x.requires_grad_()
    is_view = bias and torch.nn.functional.linear(*operands)._is_view()  # before PyTorch 2.15
    with pytest.raises(RuntimeError, match="view of a view" if is_view else "view of a leaf"):
        x.view(-1, V)[0] = 1.0


def test_a_leaf_is_let_go():
    x = defer_logits(torch.nn.Linear(D, V))(torch.randn(B, T, D))
    leaf = x.detach()
    leaf.requires_grad = True
    references = weakref.ref(x), weakref.ref(leaf)
    del x, leaf
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_retained_gradient_does_not_keep_its_logits():
    """The second one is added to the first, without being computed, and comes from a constant made of the logits."""
    head = defer_logits(torch.nn.Linear(D, V, bias=False))

    def gradient():
        x = head(torch.randn(B, T, D, requires_grad=True))
        x.retain_grad()
        x.logsumexp(-1).mean().backward(retain_graph=True)
        ((x / 2).detach().softmax(-1) * x.log_softmax(-1)).sum(-1).mean().backward()
        return weakref.ref(x), x.grad

    logits, kept = gradient()
    gc.collect()
    assert logits() is None
    assert kept.shape == (B, T, V)
