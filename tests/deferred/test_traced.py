"""Forwards that are compiled after their model was patched, and do to their logits what is not recorded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .fuzz.models import B, D, T, Tiny, V, patched
from .traced_programs import drawn, fault, forward_of


def _element(x):
    x[..., 0] = -3.0
    return x


def _scaled_through_a_view(x):
    x.view(-1, V).div_(2)
    return x


def _part(x):
    y = x[:, :-1].reshape(-1, V)  # a copy
    x[:, 0].mul_(2)
    return x + y.mul_(4).sum()


def _number_added(x):
    y = x.float()  # x itself
    y += 1.5
    return x


def _tensor_added(x):
    y = x.float()  # x itself
    y += torch.linspace(0, 1, V)
    return x


def _tensors_in_place(x):
    y, z = x.float(), x.view(-1, V)
    y -= torch.linspace(0, 1, V)
    y *= torch.linspace(1, 2, V)
    z /= torch.linspace(1, 2, V)
    return x + y


def _tensor_on_the_left(x):
    y = torch.linspace(2, 3, V) - x / 2
    x += y
    return x * y - torch.linspace(1, 2, V) / x


def _masked(x):
    x.masked_fill_(x > 0.5, -2.0)
    return F.relu(x, inplace=True) + x


def _constants(x):
    with torch.no_grad():
        y = x * 3
        x.detach().mul_(0.5)
    return x + y + x.detach()


def _operand_written_later(x):
    bias = torch.ones(V)
    y = x + bias
    bias.zero_()
    return y


def _hook(x):
    x.register_hook(lambda g: g * 3)
    return x


def _largest(x):
    return torch.where(x > x.mean(), x, x * 0.5) * (x == x.amax(-1, keepdim=True)) + (torch.zeros(V) >= x) * x


def _operators(x):
    return x % 3 + abs(x) + 2**x - torch.stack([row / 2 for row in x]) + torch.cat([x[:, :1], x[:, 1:]], 1)


def _products(x):
    return x @ torch.linspace(0, 1, V * V).view(V, V) + torch.linspace(0, 1, T * T).view(T, T) @ x


def _broken_graph(x):
    y = x * 2
    torch._dynamo.graph_break()
    return y + y[:, :1].mean()


FORWARDS = [
    value
    for name, value in list(globals().items())
    if name.startswith("_") and getattr(value, "__module__", "") == __name__
]


@pytest.mark.parametrize("after", FORWARDS, ids=lambda f: f.__name__.strip("_"))
def test_a_forward_that_is_compiled_does_what_it_does_uncompiled(after):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Tiny(nn.Linear(D, V, bias=False), after)
    ours = patched(copy.deepcopy(plain))
    ours.forward = torch.compile(ours.forward, backend="eager")
    ids = torch.arange(B * T).view(B, T) % V
    expected, found = plain(ids, labels=ids), ours(ids, labels=ids)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits.detach() * 1, expected.logits.detach())
    expected.loss.backward()
    found.loss.backward()
    for mine, true in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, true.grad)


@pytest.mark.parametrize("seed", [5, 10, 25, 112, 138])
def test_random_forwards(seed):
    """Each of these was wrong or an error once."""
    assert fault(forward_of(drawn(seed))) is None
