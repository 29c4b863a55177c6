"""Deferred logits are citizens of autograd: programs on a patched model do what they do on a plain copy of it.

One test for each kind of program that an imitated graph got wrong. `plain` is the unpatched model.
"""

import copy
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_ignore_ce
from fused_ignore_ce import defer_logits, fused_cross_entropy, fused_linear_cross_entropy, undefer_logits
from fused_ignore_ce.deferred import DeferredLogits
from fused_ignore_ce.hf import fusion_report, patch_model

from ..helpers.hf_worker import V, batches, llama

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
    assert reader.startswith(("view (test_citizens.py", "cumsum (test_citizens.py"))


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
