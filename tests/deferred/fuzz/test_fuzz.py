"""Programs drawn at random do on the patched model what they do on the plain one, and the fuzzer sees what differs."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import interpreter
from .grammar import draw
from .programs import Program, Setting, Statement
from .search import Failure, drawn, smallest, verdict_of

#: Compiling takes seconds; `python -m tests.deferred.fuzz` draws it.
SLOW = ("compile",)


@pytest.fixture(autouse=True)
def _quiet():
    """Drawn programs make PyTorch warn, patched or not. Values and errors are compared, warnings are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@st.composite
def programs(draw_from):
    return draw(lambda choices: draw_from(st.sampled_from(choices)), SLOW)


@settings(
    derandomize=True,
    database=None,
    max_examples=300,
    deadline=None,
    phases=[Phase.generate],  # `smallest` leaves out statements, which hypothesis cannot
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_programs_do_what_they_do_on_the_plain_model(drawing):
    program, plain = drawing
    verdict = verdict_of(program, plain=plain)
    if not verdict.right:
        pytest.fail(str(smallest(Failure(program, verdict))), pytrace=False)


def test_programs_do_the_same_on_two_plain_models():
    for seed in range(60):
        program, plain = drawn(seed, SLOW)
        verdict = verdict_of(program, None, plain)
        assert verdict.right, Failure(program, verdict)


def _scaled(model):
    if model.lm_head.weight.requires_grad:
        model.lm_head.weight.register_hook(lambda g: g * 1.000001)


def _no_gradient_of_hidden(model):
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].detach(),))


def _other_value(model):
    model.lm_head.register_forward_hook(lambda _, args, out: out * (1 + 1e-8))


def _on_logits(change):
    def patch(model):
        head = model.lm_head
        head.register_forward_hook(lambda _, args, out: change(out) or out)

    return patch


def _drops_hooks(logits):
    def register(hook):
        return torch.Tensor.register_hook(logits, lambda g: None)

    logits.register_hook = register


def _drops_retain_grad(logits):
    logits.retain_grad = lambda: None


def _detach_copies(logits):
    logits.detach = lambda: torch.Tensor.detach(logits).clone()


def _written_unnoticed(logits):
    def write(other):
        torch.Tensor.detach(logits).data.mul_(0.5)
        return logits

    logits.mul_ = logits.div_ = logits.add_ = write


def _refuses_to_be_written(logits):
    def write(_):
        raise RuntimeError("not in place")

    logits.mul_ = logits.div_ = logits.add_ = write


def _other_object(logits):
    logits.double = lambda: logits.to(torch.float64).view_as(logits)


class _Keeps(torch.nn.Linear):
    """A head that holds the hidden states of its last call."""

    def forward(self, hidden):
        self.kept = hidden
        return super().forward(hidden)


def _keeps_hidden(model):
    if type(model.lm_head) is torch.nn.Linear:
        model.lm_head.__class__ = _Keeps


#: Ways to break a plain model as deferred logits could, each with what has to be seen of it.
BROKEN = {
    "a gradient scaled by 1.000001": (_scaled, "gradient of"),
    "no gradient of hidden states": (_no_gradient_of_hidden, ""),
    "values off by 1e-8": (_other_value, ""),
    "hooks dropped": (_on_logits(_drops_hooks), "hook"),
    "retain_grad dropped": (_on_logits(_drops_retain_grad), "gradient of x"),
    "detach copies": (_on_logits(_detach_copies), ""),
    "a write that autograd does not see": (_on_logits(_written_unnoticed), ""),
    "a write refused": (_on_logits(_refuses_to_be_written), "not in place"),
    "another object": (_on_logits(_other_object), "is ("),
    "hidden states kept": (_keeps_hidden, "held"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_break_is_seen(broken):
    patch, what = BROKEN[broken]
    for seed in range(1000):
        program, plain = drawn(seed, SLOW)
        if not (program.setting.options or program.setting.beside):
            verdict = verdict_of(program, lambda m, **_: patch(m), plain)
            if not verdict.right and what in verdict.what:
                return
    pytest.fail("not seen in 1000 programs")


def test_a_program_is_a_snippet():
    statements = (
        Statement("forward", "x0 = model(ids).logits", ("x0",)),
        Statement("cross entropy", "s1 = ce(x0)", ("s1",)),
        Statement("backward", "s1.backward()", (), True),
    )
    program = Program(Setting(), statements)
    assert verdict_of(program, None).right
    names: dict = {}
    exec(str(program).replace("tests.deferred.fuzz.interpreter", interpreter.__name__), names)
    assert names["model"].lm_head.weight.grad is not None


def test_small_programs_have_only_what_they_need():
    def patch(model, **_):
        _scaled(model)

    def judged():
        for seed in range(100):
            program, plain = drawn(seed, SLOW)
            yield Failure(program, verdict_of(program, patch, plain))

    failure = next(
        f for f in judged() if "gradient of model.lm_head" in f.verdict.what and len(f.program.statements) > 8
    )
    small = smallest(failure, patch)
    assert "gradient of" in small.verdict.what
    assert len(small.program.statements) <= 5
