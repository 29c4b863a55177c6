"""What a loss has to do for a "yes". A check raises where the loss does something else.

The truth is PyTorch's own `F.cross_entropy` of float64 logits, differentiated by autograd. Every check that compares
numbers uses float32 operands unless it says otherwise, and allows for rounding only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine, truth
from bench.truth import Truth, expected

from .peers import PEERS, NotOfferedError, Peer

N, V, D = 16, 100, 64
IGNORED = [1, 2, 6, 7, 8, 13]


def operands(kind: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """([logits], target) or ([hidden states, head], target). Some targets are -100."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, V, (N,), generator=generator)
    target[IGNORED] = -100
    shapes = [(N, V)] if kind == "logits" else [(N, D), (V, D)]
    found = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, (1.0, 0.2), strict=False)]
    return [tensor.to(dtype).requires_grad_() for tensor in found], target


def close(name: str, found: Tensor | None, wanted: Tensor, tolerance: float = 1e-4) -> None:
    wrong = truth.fault(name, found, wanted, tolerance)
    assert wrong is None, wrong


def is_right(peer: Peer, kind: str, loss: Truth = F.cross_entropy, **options: Any) -> None:
    agrees(peer.call, *operands(kind), loss, **options)


def agrees(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], target: Tensor, loss: Truth = F.cross_entropy,
    **options: Any,
) -> None:  # fmt: skip
    """Compares loss and gradients with the truth."""
    wanted = expected(inputs, target, loss)
    compare(call(*inputs, target, **options), inputs, wanted)


def compare(loss: Tensor, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    loss.backward()
    names = ("the loss", "the gradient", "the gradient of the head")
    for name, found, value in zip(names, [loss, *(tensor.grad for tensor in inputs)], wanted, strict=False):
        close(name, found, value)


def several_ids(peer: Peer, kind: str) -> None:
    _, target = operands(kind)
    second = int(target[0])
    is_right(peer, kind, lambda x, y: F.cross_entropy(x, y.masked_fill(y == second, -100)), ignore_index=[-100, second])


def ignored_nan(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    wanted = expected(inputs, target)
    with torch.no_grad():
        inputs[0][IGNORED] = float("nan")
    compare(peer.call(*inputs, target), inputs, wanted)


def skipped(peer: Peer, kind: str) -> None:
    skips(peer.call, kind)


def skips(call: Callable[..., Tensor], kind: str) -> None:
    """Counts the operations of all matrix products, forward and backward, with and without ignored tokens."""
    counted = []
    for share in (0.0, 0.75):
        inputs, _ = operands(kind)
        target = torch.arange(N)
        target[: round(N * share)] = -100
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
            call(*inputs, target).backward()
        counted.append(sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm")))
    assert counted[0] > 0, "no matrix product was counted"
    left = counted[1] / counted[0]
    assert left < 0.5, f"with 75% of the tokens ignored, {left:.0%} of the operations are left"


def untouched(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    before = inputs[0].detach().clone()
    peer.call(*inputs, target).backward()
    assert torch.equal(inputs[0].detach(), before), "the logits were overwritten"


def upstream(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    wanted = expected(inputs, target, upstream=3.0)[1:]
    loss = peer.call(*inputs, target)
    for turn in ("first", "second"):
        found = torch.autograd.grad(loss, inputs, torch.tensor(3.0), retain_graph=True)
        for ours, value in zip(found, wanted, strict=True):
            close(f"the gradient of the {turn} backward", ours, value)


def per_token(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    weights = torch.linspace(-1, 2, N)
    wanted = expected(inputs, target, lambda x, y: F.cross_entropy(x, y, reduction="none"), weights)
    loss = peer.call(*inputs, target, reduction="none")
    close("the loss", loss, wanted[0])
    for found, value in zip(torch.autograd.grad(loss, inputs, weights), wanted[1:], strict=True):
        close("the gradient", found, value)


def smoothing(peer: Peer, kind: str) -> None:
    is_right(peer, kind, lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), label_smoothing=0.1)


def class_weights(peer: Peer, kind: str) -> None:
    weight = torch.linspace(0.5, 2, V)
    is_right(peer, kind, lambda x, y: F.cross_entropy(x, y, weight.double()), weight=weight)


def softcap(peer: Peer, kind: str) -> None:
    is_right(peer, kind, lambda x, y: F.cross_entropy(1.5 * torch.tanh(x / 1.5), y), softcap=1.5)


def z_loss(peer: Peer, kind: str) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y) + 0.1 * x.logsumexp(-1)[y != -100].square().mean()

    is_right(peer, kind, loss, z_loss=0.1)


def probabilities(peer: Peer, kind: str) -> None:
    inputs, _ = operands(kind)
    target = torch.softmax(torch.randn(N, V, generator=torch.Generator().manual_seed(1)), -1)
    agrees(peer.call, inputs, target, lambda x, y: F.cross_entropy(x, y.double()))


def _kept(values: Tensor, target: Tensor) -> Tensor:
    """The values of the kept tokens. A peer may return only these, or one for every token."""
    return values if values.numel() < target.numel() else values[target != -100]


def accuracy(peer: Peer, kind: str) -> None:
    if peer.accuracy is None:
        raise NotOfferedError("not offered")
    inputs, target = operands(kind)
    with torch.no_grad():
        logits = inputs[0] if kind == "logits" else F.linear(*inputs)
    kept = target != -100
    target[kept] = torch.where(torch.arange(int(kept.sum())) % 2 == 0, logits.argmax(-1)[kept], target[kept])
    wanted = logits.argmax(-1)[kept] == target[kept]
    found = _kept(peer.accuracy(*inputs, target), target)
    assert torch.equal(found.bool(), wanted), "the accuracy is wrong"


def entropy(peer: Peer, kind: str) -> None:
    if peer.entropy is None:
        raise NotOfferedError("not offered")
    inputs, target = operands(kind)
    kept = target != -100

    def every(x: Tensor, y: Tensor) -> Tensor:
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)[kept]

    wanted = expected(inputs, target, every)
    found = _kept(peer.entropy(*inputs, target), target)
    close("the entropy", found, wanted[0])
    for ours, value in zip(torch.autograd.grad(found.sum(), inputs), wanted[1:], strict=True):
        close("the gradient of the entropy", ours, value)


def token_loss(peer: Peer, kind: str) -> None:
    if peer.token_loss is None:
        raise NotOfferedError('`reduction="none"` only, and the mean by hand')
    inputs, target = operands(kind)
    each = expected(inputs, target, lambda x, y: F.cross_entropy(x, y, reduction="none"))[0]
    mean, found = peer.token_loss(*inputs, target)
    close("the mean", mean, each[target != -100].mean())
    close("the loss of a token", _kept(found, target), each[target != -100])


def unrounded(peer: Peer, kind: str) -> None:
    """Losses are small here and logits large, so that rounding these to bfloat16 changes a loss by several percent."""
    inputs, _ = operands(kind)
    h, w = (inputs[0].detach() * 4).bfloat16(), inputs[1].detach().bfloat16()
    logits = F.linear(h.double(), w.double())
    target = logits.argmax(-1)
    wanted = F.cross_entropy(logits, target, reduction="none")
    call = peer.unrounded or peer.call
    with torch.no_grad():
        found = torch.stack([call(h[i : i + 1], w, target[i : i + 1]).double() for i in range(N)])
    worst = (found / wanted - 1).abs().max().item()
    assert worst < 0.01, f"losses are off by up to {worst:.0%} of their value"


def one_pass(peer: Peer, kind: str) -> None:
    """The gradient is right although nothing is left of the logits when backward starts."""
    if peer.one_pass is None:
        raise NotOfferedError("not offered")
    inputs, target = operands(kind)
    wanted = expected(inputs, target)
    loss = peer.one_pass(*inputs, target)
    inputs[0].data.fill_(float("nan"))
    compare(loss, inputs, wanted)


def _distils(peer: Peer, alpha: float, beta: float = 0.3) -> None:
    if peer.distil is None:
        raise NotOfferedError("not offered")
    inputs, target = operands("linear")
    generator = torch.Generator().manual_seed(1)
    teacher = [torch.randn(N, D // 2, generator=generator), torch.randn(V, D // 2, generator=generator) * 0.2]
    p = F.linear(*(tensor.double() for tensor in teacher)).log_softmax(-1)[target != -100]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = x.log_softmax(-1)[y != -100]
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        sides = beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)
        return alpha * sides.mean() + (1 - alpha) * F.cross_entropy(x, y)

    compare(peer.distil(*inputs, *teacher, target, beta=beta, alpha=alpha), inputs, expected(inputs, target, loss))


def distillation(peer: Peer, kind: str) -> None:
    _distils(peer, 1.0)


def hard_labels(peer: Peer, kind: str) -> None:
    _distils(peer, 0.25)


def skipped_in_distillation(peer: Peer, kind: str) -> None:
    if peer.distil is None:
        raise NotOfferedError("not offered")
    distil = functools.partial(peer.distil, beta=0.3, alpha=1.0)
    teacher = [torch.randn(N, D), torch.randn(V, D)]
    skips(lambda h, w, y: distil(h, w, *teacher, y), kind)


def masked_vocabulary(peer: Peer, kind: str) -> None:
    """Masks a part of the vocabulary that is longer than a kernel's block."""
    x = torch.randn(3, 40000, generator=torch.Generator().manual_seed(0))
    x[0, :36000] = -float("inf")
    agrees(peer.call, [x.requires_grad_()], torch.tensor([39999, 5, -100]))


def all_ignored(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    peer.call(*inputs, torch.full_like(target, -100)).backward()
    for tensor in inputs:
        assert tensor.grad is not None, "a gradient is None"
        assert not tensor.grad.isnan().any(), "gradients are NaN"
        assert not tensor.grad.any(), "gradients are not zero"


def loss_scale(peer: Peer, kind: str) -> None:
    """Asks for gradients that float16 can hold only after the scale of the loss is applied."""
    scale = 16384.0
    x = torch.zeros(8, 256, dtype=torch.float16)
    x[:, 0] = 17.0
    x.requires_grad_()
    target = torch.zeros(8, dtype=torch.int64)
    wanted = expected([x], target, upstream=scale)[1]
    (peer.call(x, target).float() * scale).backward()
    assert x.grad is not None
    worst = (x.grad.double() / wanted - 1)[:, 1:].abs().max().item()
    assert worst < 0.02, f"gradients are wrong by up to {worst:.0%} of their value"


def out_of_range(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    target[0] = V  # in the first row, so that a wrong access stays within the tensor
    try:
        peer.call(*inputs, target)
    except (AssertionError, IndexError, RuntimeError, ValueError):
        return
    raise AssertionError("a target that is out of range gives a loss and no error")


def transposed(peer: Peer, kind: str) -> None:
    [x], target = operands(kind)
    columns = x.detach().t().contiguous().requires_grad_()
    agrees(lambda x, y: peer.call(x.t(), y), [columns], target, lambda x, y: F.cross_entropy(x.t(), y))


def compiled(peer: Peer, kind: str) -> None:
    """Traces the loss as one graph, without a break, and compiles it no further."""
    torch.compiler.reset()
    agrees(torch.compile(peer.call, backend="aot_eager", fullgraph=True), *operands(kind))


def bias(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    added = torch.linspace(-1, 1, V).requires_grad_()
    hidden, head, exact = (tensor.detach().double().requires_grad_() for tensor in (*inputs, added))
    F.cross_entropy(F.linear(hidden, head, exact), target).backward()
    peer.call(*inputs, target, linear_bias=added).backward()
    close("the gradient of the bias", added.grad, exact.grad)  # type: ignore[arg-type]  # backward has set both


def frozen_hidden(peer: Peer, kind: str) -> None:
    inputs, target = operands(kind)
    wanted = expected(inputs, target)[2]
    inputs[0].requires_grad_(False)
    peer.call(*inputs, target).backward()
    close("the gradient of the head", inputs[1].grad, wanted)


def on_cpu(peer: Peer, kind: str) -> None:
    """Loss and gradients are right in a process where Triton does not interpret."""
    if not peer.triton:
        is_right(peer, kind)
        return
    code = f"from bench.comparison import checks; checks.without_interpreter({peer.package!r}, {kind!r})"
    done = machine.python("-c", code, capture_output=True)
    assert not done.returncode, machine.last_line(done.stderr)


def without_interpreter(package: str, kind: str) -> None:
    is_right(next(peer for peer in PEERS[kind]() if peer.package == package), kind)
