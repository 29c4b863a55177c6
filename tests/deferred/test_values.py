"""Deferred logits hold no memory, are computed only where values are needed, and have one value whoever asks.

One test for each kind of program that was once wrong or computed logits in vain. `plain` is the unpatched model.
"""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused_ignore_ce
from fused_ignore_ce import defer_logits, fused_cross_entropy, fused_linear_cross_entropy, undefer_logits
from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import V
from ..helpers.plain_and_patched import (
    IDS,
    LABELS,
    TARGET,
    check,
    cross_entropy,
    entropy,
    small,
    steps,
)


#: 6. Memory.
@pytest.mark.parametrize("loss", [entropy, lambda x: x.logsumexp(-1).square().mean(), cross_entropy],
                         ids=["entropy", "z-loss", "cross entropy"])  # fmt: skip
def test_a_kept_loss_holds_nothing(loss):
    model, held = patch_model(small()), []
    model.lm_head.register_forward_pre_hook(lambda _, args: held.append(weakref.ref(args[0])))
    total = 0.0
    for _ in range(3):
        x = model(IDS).logits
        found = loss(x)
        found.backward()
        total = total + found
        del x, found
    assert total.grad_fn is not None
    assert [reference() for reference in held] == [None] * len(held)


#: 7. Meta and fake tensors, and counts of operations.
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": True}, {"return_stats": True}], ids=str)
def test_meta_tensors(options):
    with torch.device("meta"):
        x, h, w = (torch.empty(s, requires_grad=True) for s in ((6, 11), (6, 4), (11, 4)))
        target = torch.empty(6, dtype=torch.int64)
        options = {k: torch.empty(11) if k == "weight" else v for k, v in options.items()}
    for loss in (fused_cross_entropy(x, target, **options), fused_linear_cross_entropy(h, w, target, **options)):
        loss = loss[0] if isinstance(loss, tuple) else loss
        assert loss.is_meta
        loss.backward()
    assert x.grad.is_meta
    assert w.grad.shape == w.shape


def test_a_patched_model_on_meta_tensors():
    model = patch_model(small()).to("meta")
    for given in ({}, {"labels": LABELS.to("meta")}):
        outputs = model(input_ids=IDS.to("meta"), **given)
        assert outputs.logits.is_meta
        loss = outputs.loss if given else outputs.logits.mean()
        loss.backward()


def test_operations_of_the_head_are_counted():
    counts = []
    for model in (small(), patch_model(small())):
        with FlopCounterMode(display=False) as counter:
            model(input_ids=IDS, labels=LABELS).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0]


#: 8. Compilation of the forward that is set on the instance.
def test_a_forward_that_is_compiled_after_patching():
    torch._dynamo.reset()
    expected = small()(input_ids=IDS, labels=LABELS).loss
    model = patch_model(small())
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, expected)


#: 9. Questions that need no values.
QUESTIONS = {
    "new_zeros": lambda x: x.new_zeros(2, 3),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "new_ones": lambda x: x.new_ones((2,), dtype=torch.int64),
    "zeros_like": torch.zeros_like,
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.float64),
    "empty_like": lambda x: (torch.empty_like(x).shape, torch.empty_like(x).stride()),
    "stride": lambda x: (x.stride(), x.stride(-1), x.transpose(1, 2).stride()),
    "type": lambda x: (x.type(), x.is_contiguous(), x.transpose(1, 2).is_contiguous(), x.storage_offset()),
    "shape": lambda x: (x.shape, x.size(-1), len(x), x.numel(), x.dtype, x.device, x.dim(), x.element_size()),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_questions(question):
    check(lambda model: question(model(IDS).logits), reads=False)


def test_the_report_names_the_operation_that_read():
    model = patch_model(small())
    model(IDS).logits.view(-1).cumsum(0)
    (reader,) = fusion_report(model).reads
    assert reader.startswith(("view (test_values.py", "cumsum (test_values.py"))


#: 10. Classes in the second dimension.
CLASSES_SECOND = {
    "plain": lambda x: F.cross_entropy(x, LABELS),
    "smoothing": lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
    "weights": lambda x: F.cross_entropy(x, LABELS, torch.linspace(0.5, 1, V)),
    "probabilities": lambda x: F.cross_entropy(x, F.one_hot(TARGET, V).float().transpose(1, 2)),
    "smoothed probabilities": lambda x: F.cross_entropy(
        x, F.one_hot(TARGET, V).float().transpose(1, 2), label_smoothing=0.1
    ),
    "rows": lambda x: F.cross_entropy(x, LABELS, reduction="none", label_smoothing=0.1).mean(),
}


@pytest.mark.parametrize("scaled", ["not", "before", "after"])
@pytest.mark.parametrize("loss", CLASSES_SECOND.values(), ids=CLASSES_SECOND)
def test_classes_second(loss, scaled):
    moved = {
        "not": lambda x: x.transpose(1, 2),
        "before": lambda x: (x / 2).transpose(1, 2),
        "after": lambda x: x.transpose(1, 2) / 2,
    }
    check(steps(lambda x: loss(moved[scaled](x))), reads=False)


#: 11. Logits after the step.
def test_logits_after_the_step():
    def program(model, keep=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        outputs = model(input_ids=IDS, labels=LABELS)
        half = outputs.logits[:, 1:] / 2
        outputs.loss.backward()
        optimizer.step()
        return outputs.logits.argmax(-1), half.softmax(-1).amax(-1).detach()

    check(program, keep_logits=True)
    with pytest.raises(RuntimeError, match="keep_logits=True"):
        program(patch_model(small()))
    model = patch_model(small(), keep_logits=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=IDS, labels=LABELS).loss.backward()  # nobody holds the logits
    optimizer.step()
    assert fusion_report(model).reads == {}


#: 12. One logit is one number, whoever asks.
def test_one_logit_has_one_value():
    torch.manual_seed(0)
    head = defer_logits(torch.nn.Linear(64, 500))
    x = head(torch.randn(4, 25, 64))
    i = x.argmax(-1, keepdim=True)
    assert (x.gather(-1, i) >= x.amax(-1, keepdim=True)).all()
    assert not (x.amax(-1, keepdim=True) - x.gather(-1, i)).sqrt().isnan().any()
    assert torch.equal(x.gather(-1, i), x.max(-1, keepdim=True).values)
    assert (x.gather(-1, i).squeeze(-1) - x.logsumexp(-1) <= 0).all()
    assert ((x * 50).log_softmax(-1).gather(-1, i) <= 0).all()
    y = torch.randint(500, (4, 25, 1))
    chosen = x.gather(-1, y)
    rank = (x > chosen).sum(-1)  # a comparison computes the logits
    values = x.materialize()
    assert torch.equal(values.gather(-1, y), chosen)
    assert torch.equal(rank, (values > values.gather(-1, y)).sum(-1))


#: 13. A frozen product, and something after it that is trained.
class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(weight)
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0], None


class _FrozenHead(torch.nn.Linear):
    def __init__(self, way):
        super().__init__(24, V, bias=False)
        self.way, self.trained, self.adapter = (
            way,
            torch.nn.Parameter(torch.zeros(V)),
            torch.nn.Linear(24, V, bias=False),
        )
        self.weight.requires_grad_(False)

    def forward(self, hidden):
        if self.way == "function":
            return _Product.apply(hidden, self.weight) + self.trained
        with torch.no_grad():
            product = F.linear(hidden, self.weight)
        return product + (self.trained if self.way == "bias" else self.adapter(hidden))


@pytest.mark.parametrize("way", ["function", "bias", "adapter"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_product(way, frozen):
    def build():
        model = small()
        torch.manual_seed(0)
        model.lm_head = _FrozenHead(way)
        model.model.requires_grad_(not frozen)
        return model

    def program(model):
        loss = cross_entropy(model(IDS).logits)
        loss.backward()
        return loss

    check(program, build)


#: 14. Options: see tests/hf/test_refused.py, where they travel through every kind of operation.


#: Any model of PyTorch.
class HandWritten(torch.nn.Module):
    """A language model with nothing of transformers in it."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, 16)
        self.block = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16), torch.nn.GELU())
        self.head = torch.nn.Linear(16, V, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(h + self.block(h))


def test_any_model():
    def run(defer):
        torch.manual_seed(0)
        model = HandWritten()
        if defer:
            assert defer_logits(model.head) is model.head
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(4):
            logits = model(IDS)
            loss = F.cross_entropy(logits.view(-1, V), LABELS.view(-1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, model

    (plain, _), (ours, model) = run(False), run(True)
    assert ours == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0]
    report = fusion_report(model)
    assert report.fused["cross_entropy"].calls == 4
    assert report.reads == {}
    assert isinstance(model.head, torch.nn.Linear)
    with torch.no_grad():
        assert type(model(IDS)) is torch.Tensor
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other(IDS)) is DeferredLogits
    undefer_logits(model.head)
    assert type(model.head) is torch.nn.Linear
    assert type(model(IDS)) is torch.Tensor


def test_wrong_heads_are_errors():
    with pytest.raises(TypeError, match="head: expected a module, got str"):
        defer_logits("lm_head")
    with pytest.raises(ValueError, match=r"head: expected a module with a weight \(V, D\)"):
        defer_logits(torch.nn.Sequential())
    with pytest.raises(TypeError, match="did you mean 'label_smoothing'"):
        defer_logits(torch.nn.Linear(2, 3), label_smothing=0.1)
    assert "defer_logits" in fused_ignore_ce.__all__
    with pytest.raises(AttributeError, match="no attribute 'defer'"):
        _ = fused_ignore_ce.defer
