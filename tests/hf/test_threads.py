"""A patched model that several threads use at once: results, reports and copies are those of one thread."""

import copy
import itertools
import pickle
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from fused_ignore_ce import defer_logits
from fused_ignore_ce.deferred import head_call
from fused_ignore_ce.deferred.report import FusedCalls, Recorder
from fused_ignore_ce.hf import fusion_report, patch_model, patch_transformers, unpatch_model
from fused_ignore_ce.hf.forward import process_wide

from ..helpers.hf_tiny import V, batch, llama

SECONDS = 2.0


class Moved:
    """A forward that accelerate sets on a module: it can be copied, and has the module."""

    def __init__(self, module):
        self.module, self.forward = module, module.forward

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


def doubled(head):
    """A forward that does not call the head's own."""
    head.forward = lambda hidden: F.linear(hidden, head.weight * 2)


#: name -> what other code does to a head.
SET = {
    "own forward": lambda head: None,
    "moved": lambda head: setattr(head, "forward", Moved(head)),
    "doubled": doubled,
}


def at_once(*functions):
    """Calls each function in a thread of its own, again and again; returns how often each was called."""
    errors, counts, until = [], [0] * len(functions), time.monotonic() + SECONDS

    def loop(i):
        try:
            while time.monotonic() < until and not errors:
                functions[i]()
                counts[i] += 1
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(functions))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    assert all(counts)
    return counts


def of(model, outside=False):
    """A loss and its gradients."""
    inputs = batch()
    labels = inputs.pop("labels")
    if outside:
        logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1))
    else:
        loss = model(**inputs, labels=labels).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("head", SET)
def test_training_beside_copies_evaluation_and_reports(head, monkeypatch):
    """Every loss is taken in a call of the head, as if its weights were gone."""
    plain, model = llama(), patch_model(llama(use_cache=False))
    for each in (plain, model):
        SET[head](each.lm_head)
    expected = of(plain)
    monkeypatch.setattr(head_call, "_is_there", lambda t: False)

    def train(outside):
        torch.testing.assert_close(of(model, outside), expected, rtol=1e-4, atol=1e-6)

    def copies():
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin.state_dict(), model.state_dict())
        if head == "own forward":
            pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            twin.lm_head.weight.zero_()
            torch.testing.assert_close(twin(**batch()).loss.item(), torch.tensor(V).log().item())
        str(fusion_report(model))

    ids = batch()["input_ids"][:, :3]
    if head == "doubled":  # its forward is the original head's in every copy, without this package as well
        calls = at_once(lambda: train(False), lambda: train(True), lambda: model.generate(ids, max_new_tokens=2))
    else:
        calls = at_once(
            lambda: train(False), lambda: train(True), copies, lambda: model.generate(ids, max_new_tokens=2)
        )
    assert fusion_report(model).fused["cross_entropy"].calls == calls[0] + calls[1]
    assert fusion_report(model).reads == {}


def test_training_beside_a_compiler():
    """While a thread compiles, PyTorch says in all of them that they are compiled."""
    expected = of(llama())
    model = patch_model(llama())
    began = threading.Event()

    def compiles():
        torch._dynamo.reset()
        twin = torch.compile(copy.deepcopy(model), backend="aot_eager")
        began.set()
        torch.testing.assert_close(of(twin), expected, rtol=1e-4, atol=1e-6)

    def train(outside):
        began.wait()
        torch.testing.assert_close(of(model, outside), expected, rtol=1e-4, atol=1e-6)

    compiles()
    calls = at_once(compiles, lambda: train(False), lambda: train(True))
    assert fusion_report(model).fused.keys() == {"cross_entropy"}
    assert fusion_report(model).fused["cross_entropy"].calls == calls[1] + calls[2]


def test_counts_beside_reports():
    recorder = Recorder()
    kinds = itertools.count()

    def count():
        for _ in range(100):
            recorder.add("cross_entropy", 2, None)
            recorder.add_not_fused("why")
            recorder.add_bytes(3)

    def new_kinds():
        recorder.add(f"kind {next(kinds)}", 1, torch.tensor(1))

    calls = at_once(count, count, new_kinds, recorder.report)
    report, times = recorder.report(), 100 * (calls[0] + calls[1])
    assert report.fused["cross_entropy"] == FusedCalls(times, 2 * times)
    assert report.not_fused == {"why": times}
    assert report.bytes_not_allocated == 3 * times
    assert len(report.fused) == 1 + calls[2]


def test_forwards_beside_patches_of_the_process():
    """Models are met for the first time while the whole process is patched and unpatched."""
    plain, inputs = llama(), batch()
    expected = plain(**inputs).loss
    some = [copy.deepcopy(plain) for _ in range(1000)]

    def forward():
        if some:
            torch.testing.assert_close(some.pop()(**inputs).loss, expected)

    def patch():
        with patch_transformers():
            for _ in range(20):
                process_wide.set(process_wide.settings)

    at_once(forward, forward, patch)


def test_forwards_beside_steps_of_an_optimizer():
    head, other = defer_logits(torch.nn.Linear(2, 3), keep_logits=True), torch.nn.Linear(2, 2)
    optimizer, held = torch.optim.SGD(other.parameters()), []

    def forward():
        held.append(head(torch.ones(1, 2)))

    def step():
        time.sleep(0.4)  # until there are some
        optimizer.step()
        held.clear()

    at_once(forward, forward, step)


def test_a_copy_has_the_forward_that_was_set():
    """Patched or not, and unpatched again: the copy runs with its own weights."""
    for patched in (False, True):
        model = llama()
        for module in (model, model.lm_head):
            module.forward = Moved(module)
        if patched:
            patch_model(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        for unpatched in (False, True):
            if unpatched:
                unpatch_model(twin)
            assert twin(**batch()).loss.item() == pytest.approx(torch.tensor(V).log().item())
            twin(**batch()).loss.backward()
            assert twin.lm_head.weight.grad is not None
            assert model.lm_head.weight.grad is None
        assert type(twin.forward) is type(twin.lm_head.forward) is Moved
